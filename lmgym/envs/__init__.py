"""The environments: one token a step (single and vector), and one response a step."""
