"""Evaluation: statistics of rewards and texts, and the report of a run."""
