"""Checkpoints: their tensors, their anatomy, and how transformers loads the compressed ones."""
