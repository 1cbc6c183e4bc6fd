"""What every rank stands on: devices, process grid, signals, locks, time."""
