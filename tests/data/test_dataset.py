"""What the trainer reads is what the files hold: against the indexed files themselves, read by numpy."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_mixcpt.data.batch import IGNORE_INDEX, RankSampler, collate, valid_batches
from megatron_mixcpt.data.dataset import train_dataset, valid_datasets
from megatron_mixcpt.data.position import Draw, Position
from megatron_mixcpt.data_prep.format import DOC_START, KIND_INSTRUCTION, PAD, TARGET, open_indexed
from megatron_mixcpt.data_prep.mix import read_mix
from megatron_mixcpt.runtime.parallel import parallel_context
from tests.helpers.corpus import write_mix

SEQ = 32


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """Index caches are built by rank 0."""
    with parallel_context():
        yield


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    return read_mix(write_mix(tmp_path_factory.mktemp("dataset") / "data", seq_length=SEQ))


@pytest.fixture(scope="module")
def blend(mix, tmp_path_factory):
    """The first 100 samples of the mixture."""
    dataset = train_dataset(mix, 7, tmp_path_factory.mktemp("cache"))
    return [dataset[draw] for draw in Position.start(mix, 7).draw(100)]


def stored(mix, name):
    """`{token bytes: flags}` of a source's training sequences."""
    prefix = next(source.train.prefix for source in mix.sources if source.name == name)
    tokens, flags = open_indexed(prefix), open_indexed(f"{prefix}.flags")
    return {
        np.where(flags[i] & PAD, 0, tokens[i]).astype(np.int64).tobytes(): flags[i] for i in range(len(tokens.lengths))
    }


def test_every_sample_is_one_stored_sequence_with_its_own_flags(mix, blend):
    by_source = [stored(mix, source.name) for source in mix.train_sources]
    for sample in blend:
        tokens, flags = sample["tokens"].numpy(), sample["flags"].numpy()
        assert tokens.shape == flags.shape == (SEQ + 1,)
        expected = by_source[sample["source"]][tokens[:-1].tobytes()]
        np.testing.assert_array_equal(flags[:-1], expected)
        assert flags[-1] & DOC_START and not flags[-1] & TARGET  # nothing is predicted across sequences


def test_the_tokens_drawn_have_the_weights_of_the_mixture_whatever_the_padding(mix):
    facts, tasks = mix.train_sources
    tasks = replace(tasks, train=replace(tasks.train, tokens=tasks.train.tokens // 3))  # as if most of it were padding
    for sources in (mix.train_sources, [facts, tasks]):
        draws = Position.start(replace(mix, sources=tuple(sources)), 7).draw(1000)
        counts = np.bincount([draw.source for draw in draws], minlength=2)
        tokens = counts * np.array([source.train.tokens / source.train.sequences for source in sources])
        np.testing.assert_allclose(tokens / tokens.sum(), [source.weight for source in sources], atol=0.002)


def test_each_epoch_shows_each_sequence_once_in_another_order(mix, tmp_path):
    dataset = train_dataset(mix, 7, tmp_path)
    size = len(stored(mix, "facts"))
    epochs = [
        [
            dataset[Draw(0, number, 0)]["tokens"][:-1].numpy().tobytes()
            for number in range(epoch * size, (epoch + 1) * size)
        ]
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert sorted(epoch) == sorted(stored(mix, "facts"))
    assert epochs[0] != epochs[1] != epochs[2]


def test_validation_covers_each_split_once(mix, tmp_path):
    for name, dataset in valid_datasets(mix, 7, tmp_path).items():
        prefix = next(source.valid.prefix for source in mix.sources if source.name == name)
        tokens, flags = open_indexed(prefix), open_indexed(f"{prefix}.flags")
        expected = sorted(
            np.where(flags[i] & PAD, 0, tokens[i]).astype(np.int64).tobytes() for i in range(len(tokens.lengths))
        )
        assert sorted(dataset[i]["tokens"][:-1].numpy().tobytes() for i in range(len(dataset))) == expected


def test_labels_lie_exactly_on_targets(blend):
    batch = collate([blend[i] for i in range(10)])
    for row in range(10):
        tokens, flags = blend[row]["tokens"], blend[row]["flags"]
        for position in range(SEQ):
            label = int(tokens[position + 1]) if flags[position + 1] & TARGET else IGNORE_INDEX
            assert int(batch.labels[row, position]) == label
    kinds = batch.kinds[batch.labels != IGNORE_INDEX]
    assert set(kinds.tolist()) <= {0, KIND_INSTRUCTION}


def test_positions_restart_with_every_document(blend):
    batch = collate([blend[i] for i in range(10)])
    for row in range(10):
        expected, position = [], 0
        for index, flag in enumerate(blend[row]["flags"][:-1].tolist()):
            position = 0 if index == 0 or flag & DOC_START else position + 1
            expected.append(position)
        assert batch.position_ids[row].tolist() == expected


def test_a_source_that_is_only_held_out_is_measured_and_not_drawn(mix, tmp_path):
    facts, tasks = mix.sources
    apart = replace(mix, sources=(facts, replace(tasks, train=None, weight=0.0)))
    assert set(valid_datasets(apart, 7, tmp_path)) == {"facts", "tasks"}
    assert {draw.source for draw in Position.start(apart, 7).draw(50)} == {0}
    assert len(train_dataset(apart, 7, tmp_path).datasets) == 1


def test_padding_samples_hold_no_target(mix, tmp_path):
    batch = collate([next(iter(valid_datasets(mix, 7, tmp_path).values()))[None]])
    assert (batch.labels == IGNORE_INDEX).all()
    assert torch.equal(batch.tokens, torch.zeros_like(batch.tokens))


@pytest.mark.parametrize(("micro", "size"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)])
def test_a_step_trains_on_the_same_samples_for_any_number_of_ranks(mix, micro, size):
    """Global batch of 8, from sample 16 on."""
    position = Position.start(mix, 7)
    position.draw(16)
    ranks = [itertools.islice(RankSampler(position, micro, rank, size), 32 // (micro * size)) for rank in range(size)]
    drawn = [[draw for batch in rank for draw in batch] for rank in ranks]
    per_step = 8 // size
    for step in range(4):
        samples = {draw for rank in drawn for draw in rank[step * per_step : (step + 1) * per_step]}
        assert samples == set(position.draw(8))


@pytest.mark.parametrize(("total", "limit", "micro", "size"), [(5, None, 2, 2), (7, 3, 1, 2), (1, None, 4, 3)])
def test_validation_reads_each_sample_once_and_equally_often_on_all_ranks(total, limit, micro, size):
    ranks = [
        valid_batches(range(total), max_samples=limit, micro_batch_size=micro, data_rank=rank, data_size=size)
        for rank in range(size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    read = [i for batches in ranks for batch in batches for i in batch]
    assert sorted(i for i in read if i is not None) == list(range(min(total, limit or total)))
