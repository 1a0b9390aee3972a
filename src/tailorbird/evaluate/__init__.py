"""Perplexity, divergence and speed."""
