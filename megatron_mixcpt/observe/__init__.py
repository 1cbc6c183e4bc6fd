"""What a run shows: the console line and metrics.jsonl. Only rank 0 observes."""
