"""Forwards of our own for common families of models: the same function in fewer, larger operations.

They read the weights of the Hugging Face model where they are, and so follow its training.
"""
