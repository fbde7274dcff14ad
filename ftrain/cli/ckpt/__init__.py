"""`ftrain ckpt`: what people do with checkpoints."""
