"""What the passes add to the time of compiling a model."""
