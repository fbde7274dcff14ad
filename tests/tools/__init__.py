"""Tests of `ftrain ckpt`."""
