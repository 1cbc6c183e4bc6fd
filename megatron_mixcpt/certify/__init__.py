"""Proof before the cluster: what the trainer computes on its grid, against textbook formulas in fp64 in one process."""
