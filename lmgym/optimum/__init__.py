"""The known optimum of a task, and bounds on it."""
