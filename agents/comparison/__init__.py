"""Comparisons of runs: sweeps, one table of all runs, and the report."""
