"""Offline data preparation, from raw text to mixed token files: importable without torch."""

from megatron_mixcpt.data_prep.format import IndexedWriter, open_indexed

__all__ = ["IndexedWriter", "open_indexed"]
