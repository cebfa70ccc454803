"""Language models: loading, decoding with a cache, and the laws tokens are sampled from."""
