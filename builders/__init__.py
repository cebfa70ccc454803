"""What maintainers run: the models, optima and generated pages that lmgym ships."""
