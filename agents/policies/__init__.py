"""Networks that learn, and which of them an agent has."""
