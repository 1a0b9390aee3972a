"""Arithmetic on packed weights: the exact reference and the fast paths."""
