"""Fused LSSD loss: importable with torch and triton alone."""
