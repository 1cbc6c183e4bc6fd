"""Hugging Face directories: configurations, names, weights and tokenizers, streamed."""
