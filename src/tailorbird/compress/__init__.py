"""The pipeline that turns a checkpoint and a plan into a smaller checkpoint, and its quality gate."""
