"""What is saved and restored, as tensors and plain data: modules, optimizers, anything with a state."""
