"""Reward models that learn from feedback: what they read, how they are trained, and how good they are."""
