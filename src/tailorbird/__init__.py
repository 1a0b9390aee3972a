"""Makes a neural network that somebody else trained fit a memory budget."""

__version__ = "0.1.0"
