"""Scripts that start one process of a run on each host."""
