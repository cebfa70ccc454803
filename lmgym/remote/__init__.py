"""Responses that another process samples: a client of engines with vLLM's HTTP protocol, and a small such engine."""
