"""Algorithms and commands: what is run from the checkout."""
