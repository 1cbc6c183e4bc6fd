"""Rows of pairs hold every pair whole, exactly once, and say which token belongs to which answer."""

import pickle
import shutil

import numpy as np
import pytest
import torch

from megatron_mixcpt.config import Config, load_config, save_config, validate
from megatron_mixcpt.data_prep.assemble import flags_prefix
from megatron_mixcpt.data_prep.format import TARGET, open_indexed
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.objectives.pairs import PairRows, collate_pairs, read_pair_mix
from tests.align.conftest import SEQ_LENGTH
from tests.align.runs import align_values
from tests.helpers.corpus import edit_mix, write_mix


@pytest.fixture
def rows(stage1):
    mix = read_pair_mix(validate(Config, align_values(stage1 / "mix.json"), "test"))
    assert [source.name for source in mix.train_sources] == ["pairs", "more"]
    split = mix.train_sources[0].train
    generator = np.random.default_rng(1)
    dataset = PairRows(split.prefix, 2 * SEQ_LENGTH)
    dataset.reference = generator.normal(size=dataset.reference.shape)
    assert len(dataset) == split.sequences < len(dataset.reference)
    return dataset


def test_every_pair_is_in_one_row_and_whole(rows):
    tokens, flags = open_indexed(rows.prefix), open_indexed(flags_prefix(rows.prefix))
    assert sorted(np.concatenate(rows.pairs_of).tolist()) == list(range(len(tokens) // 2))
    for index in range(len(rows)):
        row, position = rows[index], 0
        for pair in rows.pairs_of[index].tolist():
            for sequence in (2 * pair, 2 * pair + 1):
                part = slice(position, position + len(tokens[sequence]))
                assert row["tokens"][part].tolist() == tokens[sequence].tolist()
                assert row["flags"][part].tolist() == flags[sequence].tolist()
                position = part.stop
        assert not (row["flags"][position:] & TARGET).any()


def test_a_batch_knows_the_answer_of_each_target(rows):
    """Sums over documents are sums over answers, with padding rows in between."""
    batch = collate_pairs([rows[None], rows[1], rows[0]])
    pairs = np.concatenate([rows.pairs_of[1], rows.pairs_of[0]])
    assert batch.rows.tolist() == [1] * len(rows.pairs_of[1]) + [2] * len(rows.pairs_of[0])
    np.testing.assert_array_equal(batch.reference, rows.reference[pairs])
    labels = batch.labels.t().reshape(-1)[batch.targets]
    tokens, flags = open_indexed(rows.prefix), open_indexed(flags_prefix(rows.prefix))
    for number, pair in enumerate(pairs.tolist()):
        for side in (0, 1):
            sequence = 2 * pair + side
            answer = tokens[sequence][(flags[sequence] & TARGET) != 0]
            assert labels[batch.documents == 2 * number + side].tolist() == answer.tolist()


def test_a_batch_of_padding_has_no_pairs_and_still_a_target(rows):
    batch = collate_pairs([rows[None], rows[None]])
    assert len(batch.rows) == 0 and len(batch.targets) == 1 and torch.all(batch.labels == -100)


def test_rows_travel_to_data_workers_without_their_tokens(rows):
    copy = pickle.loads(pickle.dumps(rows))
    assert torch.equal(copy[1]["tokens"], rows[1]["tokens"])
    assert len(pickle.dumps(rows)) < 20 * len(rows.row_of) * 8 + 4000


def test_a_mixture_without_pairs_is_refused(tmp_path):
    config = validate(Config, align_values(write_mix(tmp_path / "data")), "test")
    with pytest.raises(ConfigError, match="holds no preference pairs"):
        read_pair_mix(config)


def test_pairs_of_some_sources_can_be_left_out(stage1):
    weights = {"mix": str(stage1 / "mix.json"), "weights": {"pairs": 1.0, "more": 0.0}}
    mix = read_pair_mix(validate(Config, align_values(None, data=weights), "test"))
    assert [source.name for source in mix.train_sources] == ["pairs"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"align": {"method": "dpo"}, "loss": {"ce_weight": 0.5}}, "remove the loss section"),
        ({"align": {"method": "dpo", "loss": "ipo", "label_smoothing": 0.1}}, "is for align.loss sigmoid"),
        ({"align": {"method": "dpo", "betta": 0.1}}, "did you mean align.beta"),
        ({"align": {"method": "sft", "beta": 0.2}}, r"align\.beta is for align\.method dpo"),
        ({"align": {"method": "sft", "label_smoothing": 0.1}}, r"align\.label_smoothing is for align\.method dpo"),
        ({"align": {"method": "sft", "length_normalized": True}}, r"align\.length_normalized is for align\.method dpo"),
        ({"align": {"method": "sft", "loss": "ipo"}}, r"align\.loss is for align\.method dpo"),
        ({"align": {"method": "sft"}, "loss": {"kd_weight": 0.5}}, r"loss\.kd_weight: sft distils only where loss\.t"),
        ({"align": {"method": "sft"}, "teacher": {"hf": "t"}}, r"teacher\.hf: sft distils only"),
        ({"align": {"method": "sft"}, "teacher": {"source": "adapter_off"}}, r"teacher\.source: sft distils only"),
        ({"align": {"method": "dpo"}, "teacher": {"source": "deepspeed", "hf": "t"}}, "with the starting weights, not"),
    ],
)
def test_wrong_settings_are_named(stage1, section, message):
    with pytest.raises(ConfigError, match=message):
        validate(Config, align_values(stage1 / "mix.json", **section), "test")


def test_fine_tuning_needs_no_teacher_unless_asked_for(stage1):
    sft = {"align": {"method": "sft"}}
    assert not validate(Config, align_values(stage1, **sft, loss={"ce_weight": 2.0}), "test").uses_teacher
    assert validate(Config, align_values(stage1, **sft, loss={"target": "plain"}), "test").uses_teacher


def test_a_saved_configuration_of_fine_tuning_can_be_used_again(stage1, tmp_path):
    config = validate(Config, align_values(stage1, align={"method": "sft"}), "test")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(Config, str(tmp_path / "config.yaml"), []) == config


def test_pairs_that_are_only_held_out_are_measured_and_not_trained_on(stage1, tmp_path):
    shutil.copytree(stage1, tmp_path / "data", symlinks=True)

    def change(content):
        more = next(source for source in content["sources"] if source["name"] == "more")
        more["pairs"] = {"train": None, "valid": more["pairs"]["train"]}
        more["train"] = None

    edit_mix(tmp_path / "data" / "mix.json", change)
    mix = read_pair_mix(validate(Config, align_values(tmp_path / "data" / "mix.json"), "test"))
    assert [source.name for source in mix.train_sources] == ["pairs"]
    assert {source.name for source in mix.sources if source.valid} >= {"more"}
