"""A small mixture of random documents in the final format, without a tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megatron_mixcpt.data_prep import mix as data_mix
from megatron_mixcpt.data_prep.format import (
    DOC_START,
    KIND_DOMAIN,
    KIND_INSTRUCTION,
    PAD,
    ROLE_TEXT,
    TARGET,
    IndexedWriter,
    pack_flags,
    token_dtype,
)
from megatron_mixcpt.data_prep.mix import Mix, Source, Split, TokenizerEntry

KINDS = {"facts": KIND_DOMAIN, "tasks": KIND_INSTRUCTION}


def packed_sequence(generator, kind, seq_length, vocab_size):
    """One packed sequence: documents of random lengths, a masked prompt in instructions, padding at the end."""
    tokens = generator.integers(0, vocab_size, seq_length)
    flags = np.full(seq_length, pack_flags(kind, ROLE_TEXT, True), dtype=np.uint8)
    position = 0
    while position < seq_length:
        length = int(generator.integers(3, seq_length))
        flags[position] = (flags[position] | DOC_START) & ~np.uint8(TARGET)
        if kind == KIND_INSTRUCTION:
            flags[position : position + length // 3] &= ~np.uint8(TARGET)
        position += length
    padding = int(generator.integers(0, 4))
    if padding:
        flags[-padding:] = PAD
        flags[-padding] |= DOC_START
        tokens[-padding:] = 0
    return tokens, flags


def write_split(folder: Path, name, kind, sequences, seq_length, vocab_size, generator, num_used=None):
    prefix, num_tokens, num_targets = folder / name, 0, 0
    with IndexedWriter(prefix, token_dtype(vocab_size)) as tokens_file:
        with IndexedWriter(folder / f"{name}.flags", np.dtype(np.uint8)) as flags_file:
            for _ in range(sequences):
                tokens, flags = packed_sequence(generator, kind, seq_length, num_used or vocab_size)
                tokens_file.add(tokens)
                flags_file.add(flags)
                num_tokens += int(np.count_nonzero((flags & PAD) == 0))
                num_targets += int(np.count_nonzero(flags & TARGET))
            flags_file.finish()
        digest = tokens_file.finish()
    return Split(prefix, sequences, num_tokens, digest, documents=sequences, target_tokens=num_targets)


def write_mix(
    folder: Path, *, seq_length=32, vocab_size=250, train=24, valid=5, seed=0, weights=(0.6, 0.4), num_domain=None
) -> Path:
    """Write the mixture and return the path of its mix.json; the domain uses the first `num_domain` tokens alone."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)

    def split(name, kind, sequences):
        num_used = num_domain if kind == KIND_DOMAIN else None
        return write_split(folder, name, kind, sequences, seq_length, vocab_size, generator, num_used)

    sources = tuple(
        Source(
            name,
            "domain" if kind == KIND_DOMAIN else "instruction",
            weight,
            split(f"{name}-train", kind, train),
            split(f"{name}-valid", kind, valid),
        )
        for (name, kind), weight in zip(KINDS.items(), weights)
    )
    tokenizer = TokenizerEntry("huggingface", folder / "tokenizer", vocab_size, "0", None, 0, 0)
    path = folder / "mix.json"
    return data_mix.write_mix(path, Mix(path, seq_length, "", tokenizer, sources, seed)).path


def edit_mix(path: Path, change: Callable[[dict], object]) -> None:
    """Change the content of a mix.json, and seal it again."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps({**content, "fingerprint": data_mix.fingerprint(content)}))


def add_pairs(mix: Path) -> None:
    """Make the second source of a mixture one of preference pairs, with the rows that the first trains on."""

    def change(content):
        train = content["sources"][0]["train"]
        content["sources"][1] |= {"kind": "preference", "pairs": {"train": train, "valid": None}}

    edit_mix(mix, change)
