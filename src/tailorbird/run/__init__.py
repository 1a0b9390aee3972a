"""Forward passes over a loaded model."""
