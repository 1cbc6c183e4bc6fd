"""`mixcpt plan` against what real runs take."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from megatron_mixcpt.cli import main
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.plan.estimate import checkpoint_bytes, make_plan
from megatron_mixcpt.train.setup import read_model_and_mix
from tests.faults.conftest import run_settings
from tests.faults.fleet import FULL, finish, write_config
from tests.helpers.corpus import write_mix

pytestmark = pytest.mark.slow

RUNS = {
    "plain": {},
    "bf16": {"train": {"dtype": "bf16"}},
    "recompute": {"train": {"recompute": "full", "micro_batch_size": 4, "global_batch_size": 4}},
    "no teacher": {"loss": {"target": "none"}, "teacher": {"source": "none"}},
    "TP2": {"parallel": {"tensor": 2}},
    "LoRA": {"adapter": {"method": "lora"}, "teacher": {"source": "adapter_off"}},
    "ALoRA": {"adapter": {"method": "alora", "rank": 32}, "loss": {"target": "none"}, "teacher": {"source": "none"}},
    "DP2 distributed optimizer": {"train": {"distributed_optimizer": True}},
    # As many tokens a rank as the others: what gloo needs beside them counts for no more.
    "CP2": {"parallel": {"context": 2}, "train": {"micro_batch_size": 6, "global_batch_size": 12}},
    "recompute mlp": {"train": {"recompute": "mlp"}},
    "recompute attention": {"train": {"recompute": "attention"}},
    "uneven PP2": {"parallel": {"pipeline": 2, "layers_per_stage": [3, 1]}, "train": {"global_batch_size": 12}},
    "rows of 32k": {"loss": {"target": "none"}, "teacher": {"source": "none"}},
    "rows of 32k, CP2": {"parallel": {"context": 2}, "loss": {"target": "none"}, "teacher": {"source": "none"}},
    "PP2 interleaved": {"parallel": {"pipeline": 2, "interleave": 2}, "train": {"global_batch_size": 12}},
}
ALWAYS = ("plain", "recompute", "TP2", "LoRA", "CP2")  # tests/device/test_plan.py has all settings, of a claimed device
M_MMAP_THRESHOLD = -3  # malloc.h


def measure(path):
    """Write this process's resident memory before training, and the highest it reached, to `path`."""
    import ctypes
    import gc

    from megatron_mixcpt.train import loop

    original, libc = loop._train, ctypes.CDLL("libc.so.6")
    # Tensors of their own pages: what is freed leaves, so that tensors are measured and not the allocator's habits.
    libc.mallopt(M_MMAP_THRESHOLD, 64 << 10)

    def wrapped(config, *arguments):
        # A run of one small step first: it brings the libraries' pages in.
        train = config.train.model_copy(update={"steps": 1, "micro_batch_size": 1, "global_batch_size": 2})
        warm = Path(f"{config.run_dir}-warm")
        warm.mkdir(exist_ok=True)  # by whichever rank comes first
        original(config.model_copy(update={"train": train, "run_dir": str(warm)}), *arguments)
        gc.collect()
        libc.malloc_trim(0)
        before = _status("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak so far
        original(config, *arguments)
        with open(path, "w") as file:
            json.dump({"before": before, "peak": _status("VmHWM")}, file)

    loop._train = wrapped


def _status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) << 10


@pytest.fixture(scope="module")
def larger_mix(tmp_path_factory):
    return write_mix(tmp_path_factory.mktemp("plan") / "data", seq_length=512, vocab_size=8000, train=6, valid=1)


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory):
    """Rows of 32,768 tokens, and a model of a window of 256, so that no test waits for the square of the row."""
    folder = tmp_path_factory.mktemp("long")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "max_position_embeddings": 32768}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 256}
    MistralForCausalLM(MistralConfig(vocab_size=500, **sizes, **heads)).save_pretrained(folder / "hf")
    mix = write_mix(folder / "data", seq_length=32768, vocab_size=500, train=6, valid=1)
    return mix, {"preset": None, "hf": str(folder / "hf")}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.skipif(not FULL and name not in ALWAYS, reason="make test-faults"))
        for name in RUNS
    ],
)
def test_the_memory_of_a_rank_is_foreseen_within_a_tenth(tmp_path, larger_mix, long_rows, name, record):
    sections, mix = dict(RUNS[name]), larger_mix
    train = {"steps": 2, "micro_batch_size": 3, "global_batch_size": 6, "warmup_steps": 0} | sections.pop("train", {})
    if "32k" in name:
        mix, sections["model"] = long_rows
        train |= {"micro_batch_size": 1, "global_batch_size": 2}
    values = run_settings(mix, tmp_path / "run", train=train, checkpoint={"every": 0}, **sections)
    ranks = 2 if "P2" in name else 1
    faults = {rank: (measure, str(tmp_path / f"{rank}.json")) for rank in range(ranks)}
    finish(write_config(tmp_path / "train.yaml", values), ranks=ranks, faults=faults)
    config = validate(Config, values, "test")
    foreseen = max(stage.total for stage in make_plan(config, *read_model_and_mix(config), ranks, gpu=False).stages)
    measured = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    taken = max(entry["peak"] - entry["before"] for entry in measured)
    ratio = foreseen / taken
    record(f"memory plan, {name}", "within 10 %", f"{foreseen / 2**20:.0f} MiB foreseen, {taken / 2**20:.0f} taken")
    assert 0.9 <= ratio <= 1.1, f"{foreseen / 2**20:.1f} MiB foreseen, {taken / 2**20:.1f} taken"


def test_a_checkpoint_is_as_large_as_foreseen(straight):
    from megatron_mixcpt.checkpoint.info import read_info
    from megatron_mixcpt.checkpoint.store import list_checkpoints, size_of

    checkpoint = list_checkpoints(straight[0] / "checkpoints")[0]
    foreseen = checkpoint_bytes(read_info(checkpoint).architecture, "fp32")
    assert math.isclose(size_of(checkpoint), foreseen, rel_tol=0.05)


def test_the_stages_hold_the_whole_model(mix, tmp_path):
    config = validate(Config, run_settings(mix, tmp_path / "run", parallel={"tensor": 2, "pipeline": 2}), "test")
    arch, read = read_model_and_mix(config)
    stages = make_plan(config, arch, read, 4).stages
    copies = arch.padded_vocab_size(2) // 2 * arch.hidden_size  # tied embeddings: the last stage's own
    norms = (2 * arch.num_layers + 1) * arch.hidden_size
    padding = (arch.padded_vocab_size(2) - arch.vocab_size) * arch.hidden_size // 2
    expected = (arch.num_parameters - norms) // 2 + norms + copies + padding
    assert sum(stage.num_parameters for stage in stages) == expected


def test_the_command_prints_every_part(mix, tmp_path, capsys):
    config = write_config(tmp_path / "train.yaml", run_settings(mix, tmp_path / "run"))
    options = ["parallel.pipeline=2", "checkpoint.async=true", "train.dtype=bf16", "adapter.method=lora"]
    assert main(["plan", str(config), *options, "--nproc", "4"]) == 0
    shown = capsys.readouterr().out
    for part in ("weights", "optimizer", "activations", "host memory while saving", "h at 40%", "disk", "trainable"):
        assert part in shown
    assert main(["plan", str(config), "--gpu", "abacus"]) == 2 and "--peak-tflops" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
