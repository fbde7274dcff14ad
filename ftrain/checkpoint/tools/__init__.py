"""What people do with checkpoints: look, prove, compare, fork, prune. None of it is part of a training process."""
