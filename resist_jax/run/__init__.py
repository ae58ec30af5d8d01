"""A training from a config: the only room that reads a ConfigDict."""
