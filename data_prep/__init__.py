"""Offline data preparation: importable without torch."""
