"""Choosing a few samples for alignment by their score under a model."""
