"""Checkpoints of others: read without executing anything, and written so that their own readers take them."""
