"""An engine that samples the batches of an agent: the weights go there before each, and log-probs come back."""
