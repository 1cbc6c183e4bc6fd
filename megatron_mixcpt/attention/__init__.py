"""Causal attention within packed documents, and the cut of rows over context-parallel ranks."""
