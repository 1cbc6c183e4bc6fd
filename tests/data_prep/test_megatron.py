"""The stock datasets of megatron-core read what we write: same tokens, no conversation cut, no stale cache."""

import os
from pathlib import Path

import numpy as np
import pytest

from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.format import DOC_START, PAD, open_indexed
from megatron_mixcpt.data_prep.pipeline import preprocess
from tests.data_prep.helpers import load_mix, source_of

LENGTH = 128


class Stub:
    """As much of a tokenizer as GPTDataset asks for."""

    eod = pad = 0
    unique_identifiers: dict = {}  # noqa: RUF012

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size


@pytest.fixture
def result(config_values) -> Path:
    preprocess(parse_config(config_values))
    return Path(config_values["out"])


def gpt_config(mix, cache, **blend):
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    return GPTDatasetConfig(
        random_seed=3,
        sequence_length=LENGTH,
        path_to_cache=cache and str(cache),
        tokenizer=Stub(mix["tokenizer"]["vocab_size"]),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        mid_level_dataset_surplus=0.005,
        **blend,
    )


def gpt_dataset(out, mix, entry, cache, samples):
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.core.datasets.utils import Split

    config = gpt_config(mix, cache, blend=([str(out / entry["prefix"])], None), split="1,0,0")
    low = GPTDataset.build_low_level_dataset(str(out / entry["prefix"]), config)
    return GPTDataset(low, str(out / entry["prefix"]), np.arange(len(low)), samples, Split.train, config)


def test_no_sample_of_several_epochs_cuts_a_stored_sequence(result, tmp_path):
    mix = load_mix(result)
    for name in ("docs", "ask", "pairs"):
        entry = source_of(mix, name)["train"]
        stored = {row.tobytes() for row in open_indexed(result / entry["prefix"])}
        samples = 3 * entry["sequences"] - 1
        data = gpt_dataset(result, mix, entry, tmp_path / "cache", samples)
        assert len(data) >= samples
        for index in range(samples):
            assert data[index]["tokens"].numpy().astype(np.uint16).tobytes() in stored


def test_flags_line_up_with_the_tokens_of_the_same_sample_query(result, tmp_path):
    """A dataset over the flags, with the same seed and lengths, gives the flags of exactly the tokens."""
    mix = load_mix(result)
    entry = source_of(mix, "ask")["train"]
    flags_of = {
        tokens.tobytes(): flags.tobytes()
        for tokens, flags in zip(
            open_indexed(result / entry["prefix"]), open_indexed(result / f"{entry['prefix']}.flags")
        )
    }
    tokens = gpt_dataset(result, mix, entry, tmp_path / "a", 50)
    flags = gpt_dataset(result, mix, {"prefix": f"{entry['prefix']}.flags"}, tmp_path / "b", 50)
    for index in range(50):
        text, _ = tokens._query_document_sample_shuffle_indices(index)
        marks, _ = flags._query_document_sample_shuffle_indices(index)
        assert marks[:LENGTH].astype(np.uint8).tobytes() == flags_of[text[:LENGTH].astype(np.uint16).tobytes()]


def test_the_blended_builder_reads_train_and_valid(result):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset

    mix = load_mix(result)
    blends = [
        ([str(result / source[split]["prefix"]) for source in mix["sources"]], [s["weight"] for s in mix["sources"]])
        for split in ("train", "valid")
    ]
    config = gpt_config(mix, None, blend_per_split=[*blends, None])  # a cache would need a process group
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, [100, 20, 0], lambda: True, config).build()
    stored = {
        split: {row.tobytes() for source in mix["sources"] for row in open_indexed(result / source[split]["prefix"])}
        for split in ("train", "valid")
    }
    counts = np.zeros(len(mix["sources"]))
    for index in range(100):
        sample = train[index]
        counts[int(sample.get("dataset_id", train.dataset_index[index]))] += 1
        assert sample["tokens"].numpy().astype(np.uint16).tobytes() in stored["train"]
    # Weights are shares of tokens, and sequences are of one length: off by one sample at most.
    assert np.abs(counts - 100 * np.array([source["weight"] for source in mix["sources"]])).max() <= 1
    for index in range(20):
        assert valid[index]["tokens"].numpy().astype(np.uint16).tobytes() in stored["valid"]


def test_an_index_cache_of_old_data_cannot_be_taken_for_new_data(config_values, corpus, tmp_path):
    """Megatron caches sample indices by the name of the prefix: other content must have another name."""
    cache = tmp_path / "cache"
    preprocess(parse_config(config_values))
    out = Path(config_values["out"])
    mix = load_mix(out)
    gpt_dataset(out, mix, source_of(mix, "ask")["train"], cache, 40)
    before = set(os.listdir(cache))
    text = corpus["instruction"].read_text()
    corpus["instruction"].write_text("".join(reversed(text.splitlines(keepends=True))))
    preprocess(parse_config(config_values))
    new_mix = load_mix(out)
    entry = source_of(new_mix, "ask")["train"]
    assert entry["prefix"] != source_of(mix, "ask")["train"]["prefix"]
    data = gpt_dataset(out, new_mix, entry, cache, 40)
    assert set(os.listdir(cache)) > before
    stored = {row.tobytes() for row in open_indexed(out / entry["prefix"])}
    assert all(data[i]["tokens"].numpy().astype(np.uint16).tobytes() in stored for i in range(40))


def test_a_window_of_one_more_token_never_predicts_across_sequences(result, tmp_path):
    """GPTDataset takes seq_length + 1 tokens: the extra one is the start of another sequence and no target."""
    mix = load_mix(result)
    entry = source_of(mix, "docs")["train"]
    flags = gpt_dataset(result, mix, {"prefix": f"{entry['prefix']}.flags"}, tmp_path / "b", 60)
    for index in range(60):
        marks, _ = flags._query_document_sample_shuffle_indices(index)
        assert len(marks) == LENGTH + 1
        assert int(marks[-1]) & DOC_START or int(marks[-1]) & PAD
        assert not int(marks[-1]) & 1
