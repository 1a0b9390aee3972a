"""From text to token batches and statistics, one block at a time."""
