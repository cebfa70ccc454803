"""Rows of data: one reader for prompts, preferences and demonstrations."""
