"""Rows of data as people have them: prompts, preferences and demonstrations are read by one reader."""
