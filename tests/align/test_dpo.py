"""DPO on every process grid against transformers in fp64, one answer at a time; and stopping changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_mixcpt.checkpoint import list_checkpoints
from megatron_mixcpt.config import AlignSettings, Config, validate
from megatron_mixcpt.data_prep.assemble import flags_prefix
from megatron_mixcpt.data_prep.format import TARGET, open_indexed
from megatron_mixcpt.data_prep.mix import Split
from megatron_mixcpt.model.stage import Start
from megatron_mixcpt.objectives.reference import _fingerprint
from megatron_mixcpt.plan.assumed import assumed_mix
from tests.align.oracle import plain
from tests.align.runs import align_values, first_steps, train_all
from tests.helpers.ports import free_port
from tests.helpers.spawn import run_distributed
from tests.train.runs import keep_only_step, losses, saved_tensors

ALIGN = {"method": "dpo", "beta": 0.5, "label_smoothing": 0.1}
ROWS = 24
LAYOUTS = {
    "one": (1, {}, 4),
    "one at micro-batch 1": (1, {}, 1),
    "TP2": (2, {"tensor": 2}, 2),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}, 2),
    "PP2": (2, {"pipeline": 2}, 2),
    "PP2xV2": (2, {"pipeline": 2, "interleave": 2}, 2),
    "DP2": (2, {}, 3),
    "CP2": (2, {"context": 2}, 2),
}


def values(mix, model, run_dir, **sections):
    return {
        "model": model,
        "data": {"mix": str(mix), "weights": {"pairs": 1.0, "more": 0.0}},
        "train": {"steps": 4, "micro_batch_size": 2, "global_batch_size": 4, "lr": 1e-3, "dtype": "fp32"},
        "align": ALIGN,
        "run_dir": str(run_dir),
        **sections,
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory, stage1, model_dir):
    folder = tmp_path_factory.mktemp("dpo")
    found = {}
    for world_size in (1, 2):
        runs = {}
        for name, (size, parallel, micro) in LAYOUTS.items():
            if size == world_size:
                train = {"steps": 1, "micro_batch_size": micro, "global_batch_size": ROWS, "dtype": "fp32"}
                sections = {"train": train, "parallel": parallel}
                run = values(stage1 / "mix.json", {"hf": str(model_dir)}, folder / name, **sections)
                runs[name] = (free_port(), run)
        found |= run_distributed(first_steps, world_size, runs, timeout=300)[0]
    return found


@pytest.fixture(scope="module")
def oracle(results, stage1, model_dir):
    """Log-probabilities of every answer, loss and gradients: transformers, fp64, no packing, no kernels of ours."""
    from transformers import AutoModelForCausalLM

    from megatron_mixcpt.objectives.pairs import PairRows

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    (name,) = (name for name in results["one"]["reference"] if name.startswith("pairs-pairs-train"))
    prefix = stage1 / name
    tokens, flags = open_indexed(prefix), open_indexed(flags_prefix(prefix))
    answers, lengths = [], []
    for sequence in range(len(tokens)):
        ids = torch.from_numpy(tokens[sequence].astype(np.int64))
        target = torch.from_numpy((flags[sequence][1:] & TARGET) != 0)
        logp = model(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
        answers.append((logp.gather(1, ids[1:, None])[:, 0] * target).sum())
        lengths.append(int(target.sum()))
    policy, lengths = torch.stack(answers).view(-1, 2), torch.tensor(lengths).view(-1, 2)
    start = policy.detach().clone()
    reference = start + torch.from_numpy(np.random.default_rng(5).normal(size=start.shape))
    rows = PairRows(prefix, 128)
    times = torch.zeros(len(policy), dtype=torch.float64)  # how often each pair is in the batch
    for i in range(ROWS):
        times[rows.pairs_of[i % len(rows)]] += 1
    options = {key: value for key, value in ALIGN.items() if key != "method"}
    loss = (plain(policy, reference, lengths, **options) * times).sum() / times.sum()
    loss.backward()
    h = AlignSettings(**ALIGN).beta * (policy.detach() - reference)
    accuracy = ((h[:, 0] > h[:, 1]) * times).sum() / times.sum()
    gradients = {
        "embedding.word_embeddings.weight": model.model.embed_tokens.weight.grad,
        "decoder.final_layernorm.weight": model.model.norm.weight.grad,
        "output_layer.weight": model.lm_head.weight.grad,
        "decoder.layers.1.mlp.linear_fc2.weight": model.model.layers[1].mlp.down_proj.weight.grad,
    }
    return {"name": name, "start": start, "loss": loss.item(), "gradients": gradients, "accuracy": accuracy.item()}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_log_probabilities_are_those_of_transformers(results, oracle, layout):
    found = results[layout]["reference"][oracle["name"]]
    np.testing.assert_allclose(found, oracle["start"].numpy(), rtol=1e-5, atol=0)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_those_of_transformers(results, oracle, layout):
    found = results[layout]
    assert found["loss"] == pytest.approx(oracle["loss"], abs=1e-5)
    assert found["metrics"]["rewards/accuracy"] == pytest.approx(oracle["accuracy"], abs=1e-9)
    for name, gradient in oracle["gradients"].items():
        scale = gradient.abs().max().item()
        np.testing.assert_allclose(found["gradients"][name], gradient.numpy(), atol=1e-5 * scale, rtol=0, err_msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_every_grid_agrees_with_one_process(results, layout):
    one, other = results["one"], results[layout]
    assert other["loss"] == pytest.approx(one["loss"], abs=1e-6)
    for name, value in one["metrics"].items():
        assert other["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    for name, gradient in one["gradients"].items():
        scale = np.abs(gradient).max()
        np.testing.assert_allclose(
            other["gradients"][name], gradient, atol=2e-6 * max(scale, 1e-2), rtol=0, err_msg=name
        )


@pytest.mark.distributed
def test_kept_references_are_of_rows_of_one_length_and_a_plan_without_data_counts_such_rows():
    """The same pairs in longer rows stand in another order."""
    config = validate(Config, align_values("mix.json", data={"mix": "mix.json", "seq_length": 64}), "test")
    split = Split(Path("pairs"), sequences=4, tokens=400, content="c")
    kept = {_fingerprint(config, Start(), split, stride=8, row_length=length) for length in (2048, 2048, 4096)}
    assert len(kept) == 2
    (source,) = assumed_mix(config, 1000, 100).sources
    assert source.train.sequences == 8  # of 128 tokens, as a chosen and a rejected answer take


def test_resume_is_bitwise_and_takes_the_reference_from_the_run(tmp_path, stage1):
    """From step 2 of 4 on two data-parallel ranks; before the first step the loss is log 2 exactly."""

    def run(name):
        return values(stage1 / "mix.json", {"preset": "tiny"}, tmp_path / name, checkpoint={"every": 2, "keep": 5})

    runs = [(free_port(), run("straight")), (free_port(), run("broken"))]
    run_distributed(train_all, 2, runs, timeout=300)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    keep_only_step(broken, 2)
    parts = {path: path.stat().st_mtime_ns for path in broken.glob("reference/*/*.part")}
    assert len(parts) >= 2  # of training and of validation pairs
    run_distributed(train_all, 2, [(free_port(), run("broken"))], timeout=300)
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    assert losses(broken) == losses(straight)
    assert losses(straight)[1] == pytest.approx(np.log(2.0), abs=1e-12)
    assert losses(straight)[4] < losses(straight)[1]
    expected, found = (saved_tensors(list_checkpoints(folder / "checkpoints")[0]) for folder in (straight, broken))
    assert all(torch.equal(expected[key], found[key]) for key in expected) and expected.keys() == found.keys()


def train_with_a_known_peak(rank, world_size, runs):
    from megatron_mixcpt.train import bookkeeping

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bookkeeping, "peak_flops", lambda device, dtype: 1e15)
        train_all(rank, world_size, runs)


@pytest.mark.distributed
def test_there_is_no_mfu_where_the_flops_of_a_token_differ(tmp_path, stage1):
    runs = []
    for method in ("sft", "dpo"):
        sections = {"train": {"steps": 1, "global_batch_size": 2, "dtype": "fp32"}, "align": {"method": method}}
        runs.append((free_port(), values(stage1 / "mix.json", {"preset": "tiny"}, tmp_path / method, **sections)))
    runs[0][1]["data"] = {"mix": str(stage1 / "mix.json")}
    run_distributed(train_with_a_known_peak, 1, runs, timeout=300)
    texts = {method: (tmp_path / method / "metrics.jsonl").read_text() for method in ("sft", "dpo")}
    assert "speed/tok_per_s_gpu" in texts["dpo"] and "speed/mfu" not in texts["dpo"]
    assert "speed/mfu" in texts["sft"]
