"""State, steps, loops, checkpoints and metrics."""
