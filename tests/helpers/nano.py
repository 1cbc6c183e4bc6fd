"""A model small enough to keep whole checkpoints of it among the tests."""

from megatron_mixcpt.architecture.architecture import PRESETS, Architecture

NANO = Architecture(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=2,
    num_query_groups=1,
    head_dim=8,
    vocab_size=120,
    tie_word_embeddings=True,
)


def use_nano():
    """Call in every process: makes `model.preset: nano` known there."""
    PRESETS["nano"] = NANO
