"""Language models: loading, decoding with a cache, and sampling."""
