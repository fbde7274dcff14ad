"""From packs, arenas or living ranks back into tensors."""
