"""LoRA and ALoRA: their layers, layout over ranks, checkpoints and files."""
