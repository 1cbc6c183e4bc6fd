"""A run in small on this machine's CPU: the same grid, the same code, before anything waits for GPUs."""
