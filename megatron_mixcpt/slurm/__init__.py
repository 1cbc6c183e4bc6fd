"""From a configuration to jobs of a SLURM cluster: what they ask for, their scripts, and submitting them once."""
