"""A training from a config: the only package that reads a ConfigDict."""
