"""Packed weights, the modules that hold them, and other tools' formats."""
