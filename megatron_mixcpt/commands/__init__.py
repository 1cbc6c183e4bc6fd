"""The subcommands of `mixcpt`: each parses, calls the function that does the work, and prints."""
