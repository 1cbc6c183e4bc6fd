"""What a configuration would take, before it is started."""
