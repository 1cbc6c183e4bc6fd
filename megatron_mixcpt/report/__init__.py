"""Pages and figures in one look; nothing of the trainer is imported, and nothing heavy."""
