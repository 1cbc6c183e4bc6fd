"""Measuring a Hugging Face directory: what was learned (domain perplexity, fact recall) and what was forgotten.

Everything here goes through transformers alone, so that the judge shares no code with the trainer that is judged.
"""
