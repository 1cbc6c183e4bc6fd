"""Stage 2 of Mix-CPT: choose a few samples that the model finds easy, and teach it the format with them (SFT, DPO)."""
