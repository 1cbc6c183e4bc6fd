"""`make gpu`: everything that one GPU can tell of this project, in at most nine minutes (docs/gpu.md)."""
