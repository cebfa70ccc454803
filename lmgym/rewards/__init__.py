"""Reward functions: text in, one number an episode out."""
