"""Memory that tensors are copied to: the arena, and the copying."""
