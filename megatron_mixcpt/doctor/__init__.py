"""What of this machine would end a run."""
