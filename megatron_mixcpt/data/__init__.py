"""What the trainer reads: token and flag datasets, their blend, and the exact position in it."""
