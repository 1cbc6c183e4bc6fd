"""A rehearsal runs the real grid in small, and fails where the run would."""

import dataclasses
import json

import numpy as np
import pytest
import yaml

from megatron_mixcpt.adapters.layout import adapted_linears
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.cli import main
from megatron_mixcpt.config import AdapterConfig, Config, validate
from megatron_mixcpt.data_prep.format import DOC_START, TARGET, open_indexed
from megatron_mixcpt.data_prep.mix import read_mix
from megatron_mixcpt.errors import ConfigError, MixcptError
from megatron_mixcpt.huggingface.config import architecture_from_hf
from megatron_mixcpt.rehearse import grid
from megatron_mixcpt.rehearse.excerpt import SEQUENCES, piece, richest, write_excerpt
from megatron_mixcpt.rehearse.grid import fitting_grid
from megatron_mixcpt.rehearse.rehearsal import _checked
from megatron_mixcpt.rehearse.scale import small_architecture, small_run, write_random_model
from megatron_mixcpt.rehearse.size import Grid
from tests.helpers.corpus import edit_mix, write_mix
from tests.model.families import FAMILIES, make
from tests.slurm.published import CONFIGS
from tests.train.runs import settings

LLAMA_70B = Architecture(80, 8192, 28672, 64, 8, 128, 1024)  # but for its vocabulary


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    return write_mix(tmp_path_factory.mktemp("rehearse") / "data", seq_length=48, vocab_size=120)


@pytest.fixture(scope="module")
def preferences(mix):
    """The same with preference pairs, of which only the chosen answers are trained on."""

    def change(content):
        train = content["sources"][0]["train"]
        content["sources"][1] |= {"kind": "preference", "pairs": {"train": train, "valid": None}}

    path = mix.with_name("preferences.json")
    path.write_text(mix.read_text())
    edit_mix(path, change)
    return path


def published(folder, name):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return architecture_from_hf(folder)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_grid_trains_saves_and_resumes_in_small(tmp_path, preferences, capfd):
    """Qwen2's shape (biases, seven queries a group) over tensor 2 with sequence parallelism, pipeline 2, bf16."""
    published(tmp_path / "model", "Qwen2-7B")
    values = settings(
        preferences,
        tmp_path / "run",
        model={"hf": str(tmp_path / "model"), "preset": None},
        train={"steps": 100, "micro_batch_size": 4, "global_batch_size": 64, "dtype": "bf16", "warmup_steps": 10},
        parallel={"tensor": 2, "pipeline": 2, "sequence": True},
        checkpoint={"every": 50, "async": True},
    )
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(values))
    assert main(["rehearse", str(config), "--nproc", "4", "train.recompute=full"]) == 0
    shown = capfd.readouterr().out
    assert "tensor 2 x pipeline 2 x data 1 = 4 processes, gloo" in shown
    assert "2 of 28 layers" in shown and "48 of 48 tokens" in shown
    assert "resumed from" in shown and "all went well: 4 steps, validation, 4 saves, a resume from step 2" in shown
    assert "next:" not in shown  # there is nothing left to export
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_rows_cut_over_ranks_and_an_interleaved_pipeline_are_rehearsed(tmp_path, mix, capfd):
    parallel = {"pipeline": 2, "interleave": 2, "context": 2, "layers_per_stage": [1, 1, 1, 1]}
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(settings(mix, tmp_path / "run", parallel=parallel)))
    assert main(["rehearse", str(config), "--nproc", "4"]) == 0
    shown = capfd.readouterr().out
    assert "tensor 1 x pipeline 2 x context 2 x data 1 = 4 processes, gloo" in shown
    assert "4 of 4 layers" in shown and "all went well: 4 steps, validation" in shown


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 2), (8, 4)])
def test_small_models_are_of_the_same_family_and_fit_the_grid(tmp_path, name, tensor, pipeline):
    arch = published(tmp_path / "real", name)
    try:
        arch.check_layout(tensor, pipeline)
    except ConfigError:
        pytest.skip("the model itself cannot be cut so")
    small = small_architecture(arch, tensor, pipeline, 256)
    small.check_layout(tensor, pipeline)
    same = ("model_type", "vocab_size", "qkv_bias", "qk_norm", "tie_word_embeddings", "rope_theta", "norm_eps")
    assert all(getattr(small, field) == getattr(arch, field) for field in same)
    grouped = arch.num_attention_heads > arch.num_query_groups
    assert (small.num_attention_heads > small.num_query_groups) == grouped
    # What is shared out over the ranks and what each has a copy of is the same in small.
    assert (small.num_query_groups < tensor) == (arch.num_query_groups < tensor)
    assert small.num_parameters - 2 * small.vocab_size * small.hidden_size < 20e6


def test_the_written_model_is_read_back_as_it_was_meant(tmp_path):
    import torch

    arch = small_architecture(published(tmp_path / "real", "Qwen2-7B"), 4, 2, 256)
    write_random_model(arch, tmp_path / "small", torch.bfloat16, seed=1)
    assert architecture_from_hf(tmp_path / "small") == arch


def test_every_family_in_small_is_read_back_as_it_was_meant(tmp_path):
    import torch

    for name in FAMILIES:
        make(name, tmp_path / name)
        arch = small_architecture(architecture_from_hf(tmp_path / name), 2, 2, 64)
        write_random_model(arch, tmp_path / f"{name}-small", torch.bfloat16, seed=1)
        assert architecture_from_hf(tmp_path / f"{name}-small") == arch, name


def test_an_excerpt_holds_the_beginnings_of_the_samples(tmp_path, mix):
    whole = read_mix(mix)
    path = write_excerpt(whole, tmp_path / "excerpt", 20)
    short = read_mix(path)
    assert short.seq_length == 20 and [s.name for s in short.sources] == [s.name for s in whole.sources]
    for before, after in zip(whole.sources, short.sources):
        for split in ("train", "valid"):
            for ending in ("", ".flags"):
                long = open_indexed(f"{getattr(before, split).prefix}{ending}")
                cut = open_indexed(f"{getattr(after, split).prefix}{ending}")
                assert len(cut) == min(len(long), SEQUENCES)
                assert all((cut[i] == long[i][:20]).all() for i in range(len(cut)))
        assert open_indexed(f"{after.train.prefix}.flags")[0][0] & DOC_START


def test_of_a_sample_whose_beginning_teaches_nothing_an_excerpt_has_a_piece_that_does(tmp_path):
    """A prompt that is longer than the excerpt's rows."""
    tokens = np.arange(40)
    flags = np.zeros(40, np.uint8)
    flags[0], flags[30:36] = DOC_START, TARGET
    begin = int(richest(flags, 20)[0])
    row, marks = piece(tokens, flags, begin, 20)
    assert row.tolist() == list(range(begin, begin + 20)) and ((marks & TARGET) > 0).sum() == 6
    assert marks[0] & DOC_START and flags[0] == DOC_START and not flags[begin] & DOC_START
    assert richest(flags[:10], 20).tolist() == [0]  # a sample that is shorter


def test_pairs_which_only_alignment_reads_are_not_part_of_an_excerpt(tmp_path, preferences):
    whole = read_mix(preferences)
    assert whole.sources[1].pairs[0] is not None
    short = read_mix(write_excerpt(whole, tmp_path / "excerpt", 20)).sources[1]
    assert short.kind == "preference" and short.train is not None and short.pairs == (None, None)


def grid_of_32(mix, nproc):
    """What fitting_grid is asked for 70B over tensor 8 x pipeline 4, but for a small vocabulary."""
    train = {"global_batch_size": 64}
    values = settings(mix, "run", parallel={"tensor": 8, "pipeline": 4}, train={"steps": 9, **train})
    small = small_architecture(LLAMA_70B, 8, 4, 48)
    return validate(Config, values, "test"), LLAMA_70B, nproc // 32, small, read_mix(mix)


@pytest.mark.parametrize(
    ("nproc", "free_gib", "expected"),
    [(64, 100, Grid(8, 4, 2)), (64, 30, Grid(8, 4, 1)), (32, 100, Grid(8, 4, 1)), (256, 100, Grid(8, 4, 2))],
)
def test_data_parallel_ranks_are_as_many_as_have_room(monkeypatch, mix, nproc, free_gib, expected):
    monkeypatch.setattr(grid, "available_memory", lambda: free_gib * 2**30)
    assert fitting_grid(*grid_of_32(mix, nproc)) == expected


def test_a_machine_without_room_for_one_replica_is_refused(monkeypatch, mix):
    monkeypatch.setattr(grid, "available_memory", lambda: 2**33)
    with pytest.raises(ConfigError, match=r"takes 32 processes of about 0.8 GiB, but 8.0 GiB are free"):
        fitting_grid(*grid_of_32(mix, 32))


def test_settings_that_name_no_size_are_kept(tmp_path, mix):
    values = settings(
        mix,
        "run",
        train={"steps": 1000, "micro_batch_size": 4, "global_batch_size": 512, "schedule": "wsd", "lr": 3e-4},
        teacher={"source": "cached", "cache": "somewhere"},
        loss={"target": "plain", "by_kind": {"instruction": {"ce": 0.5}}},
        parallel={"pipeline": 4},
    )
    config = validate(Config, values, "test")
    small = validate(Config, small_run(config, LLAMA_70B, 8, Grid(1, 4, 2), tmp_path, mix, tmp_path / "run"), "small")
    assert (small.train.steps, small.train.micro_batch_size, small.train.global_batch_size) == (4, 2, 2 * 2 * 8)
    assert small.train.schedule == "wsd" and small.train.lr == 3e-4 and small.loss == config.loss
    assert small.teacher.source == "initial"


@pytest.mark.parametrize(
    ("expert", "context", "nproc", "data", "few"),
    [(8, 1, 64, 64, 2), (8, 1, None, 8, 2), (8, 4, None, 2, 4), (3, 1, 6, 6, 1), (1, 1, None, 2, 1)],
)
def test_experts_are_spread_over_as_many_ranks_as_there_are(tmp_path, mix, expert, context, nproc, data, few):
    """The small model has four; two data-parallel ranks are rehearsed."""
    parallel = {"expert": expert, "context": context}
    values = settings(mix, "run", parallel=parallel, train={"micro_batch_size": 1, "global_batch_size": 64})
    config = validate(Config, values, "test")
    assert grid.data_parallel_size(config, nproc) == data
    small = validate(
        Config, small_run(config, LLAMA_70B, data, Grid(1, 1, 2, context), tmp_path, mix, tmp_path), "small"
    )
    assert small.parallel.expert == few


@pytest.mark.parametrize(
    ("targets", "small"),
    [
        (["q_proj", "w*"], ["q_proj", "w*"]),
        (
            ["model.layers.1?.*.o_proj", "k_proj"],
            ["model.layers.*.self_attn.k_proj", "model.layers.*.self_attn.o_proj"],
        ),
        (
            ["model.layers.30.block_sparse_moe.experts.*"],
            [f"model.layers.*.block_sparse_moe.experts.*.w{number}" for number in (1, 2, 3)],
        ),
    ],
)
def test_adapters_stay_on_the_same_kinds_of_layers(tmp_path, mix, targets, small):
    """Of a model of 32 layers, where the small one has two."""
    arch = Architecture(32, 128, 352, 4, 4, 32, 1024, model_type="mixtral", num_experts=8, experts_per_token=2)
    arch = dataclasses.replace(arch, expert_ffn_size=352, normalize_routing=True)
    values = settings(mix, "run", adapter={"method": "lora", "rank": 4, "targets": targets})
    run = small_run(validate(Config, values, "test"), arch, 1, Grid(1, 1, 1), tmp_path, mix, tmp_path)
    assert run["adapter"]["targets"] == small
    adapter = AdapterConfig.model_validate(run["adapter"])
    assert adapted_linears(small_architecture(arch, 1, 1, 48), adapter)


def test_what_the_run_itself_refuses_is_refused(tmp_path, mix, capsys):
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(settings(mix, tmp_path / "run")))
    assert main(["rehearse", str(config), "--nproc", "3", "parallel.tensor=2"]) == 2
    assert "not 3" in capsys.readouterr().err


def row(step, loss):
    return json.dumps({"step": step, "train/loss": loss})


def test_a_second_start_that_begins_anew_or_a_loss_that_is_no_number_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = [row(1, 2.0), row(2, 1.5)]
    path.write_text("\n".join([*first, row(3, 1.2), row(4, 1.1)]))
    assert len(_checked(path, 4, first)) == 4
    with pytest.raises(MixcptError, match="did not go on"):
        _checked(path, 4, [row(1, 2.0), row(2, 1.6)])
    path.write_text("\n".join([row(1, 2.0), row(2, None)]))
    with pytest.raises(MixcptError, match="losses of 2 steps"):
        _checked(path, 2, [])


def test_the_architecture_of_a_preset_can_be_small_too():
    small = small_architecture(Architecture(4, 128, 352, 4, 4, 32, 1024), 2, 1, 64)
    assert (small.num_attention_heads, small.num_query_groups) == (2, 2)
