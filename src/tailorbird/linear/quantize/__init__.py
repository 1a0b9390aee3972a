"""Linear methods that lower the bits of a weight."""
