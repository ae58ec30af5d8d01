"""How parts of the network travel between workers."""
