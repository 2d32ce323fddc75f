"""Rewards: what a completion is worth, by rule or by model."""
