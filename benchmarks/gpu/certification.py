"""`mixcpt certify` on this device, a process for each case, several at once."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.gpu.findings import Findings, LeftOut
from benchmarks.gpu.processes import run_within
from megatron_mixcpt.architecture.architecture import Architecture, RopeScaling
from megatron_mixcpt.convert.certificate import read_certificate
from megatron_mixcpt.demo.base_model import save_tiny_tokenizer
from megatron_mixcpt.rehearse.scale import write_model
from tests.helpers.corpus import add_pairs, write_mix

LLAMA = Architecture(2, 64, 128, 4, 2, 16, 250)
QWEN2 = dataclasses.replace(LLAMA, model_type="qwen2", qkv_bias=True)
QWEN3 = dataclasses.replace(LLAMA, model_type="qwen3", qk_norm=True)
MISTRAL = dataclasses.replace(LLAMA, model_type="mistral", sliding_window=16)
LLAMA3 = dataclasses.replace(
    LLAMA, tie_word_embeddings=True, rope_scaling=RopeScaling("llama3", 8.0, original_max_position_embeddings=64)
)
MIXTURE = dataclasses.replace(
    QWEN3,
    model_type="qwen3_moe",
    num_experts=8,
    experts_per_token=4,
    expert_ffn_size=48,
    normalize_routing=True,
    dense_layers=(1,),
)
NO_TEACHER: dict[str, Any] = {"loss": {"target": "none"}, "teacher": {"source": "none"}}
BASE: dict[str, Any] = {"teacher": {"source": "adapter_off"}}
CACHE, TEACHER = "cache", "teacher"  # of a case, beside its train.yaml
DEEPSPEED: dict[str, Any] = {"teacher": {"source": "deepspeed", "hf": TEACHER}}
# Each is computed in fp32 and in bf16. The first are what most runs are.
CASES: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "swapped teacher": (LLAMA, {}),
    "cross-entropy alone": (LLAMA, NO_TEACHER),
    "fused head": (QWEN2, {"loss": {"fuse_lm_head": True}}),
    "LoRA, the base as teacher": (LLAMA3, BASE | {"adapter": {"method": "lora", "rank": 4}}),
    "ALoRA, the base as teacher": (LLAMA, BASE | {"adapter": {"method": "alora", "rank": 4}}),
    "recompute full": (LLAMA, {"train": {"recompute": "full"}}),
    "DPO": (LLAMA, {"loss": {"target": "none"}, "align": {"method": "dpo"}}),
    "mixture of experts": (MIXTURE, {"train": {"router": "trained", "router_balance": 0.1}}),
    "sliding window": (MISTRAL, {"train": {"recompute": "attention"}}),
    "SFT": (LLAMA, {"loss": {"target": "none"}, "align": {"method": "sft"}}),
    "plain teacher, temperature 2": (QWEN3, {"loss": {"target": "plain", "temperature": 2.0}}),
    "margin": (LLAMA3, {"loss": {"target": "mft"}, "train": {"recompute": "mlp"}}),
    "LoRA, a frozen copy as teacher": (QWEN2, {"adapter": {"method": "lora", "rank": 4}}),
    "ALoRA, sliding window": (MISTRAL, BASE | {"adapter": {"method": "alora", "rank": 4}}),
    "distributed optimizer": (LLAMA, {"train": {"distributed_optimizer": True, "overlap_grad_reduce": True}}),
    "cached teacher": (LLAMA, {"teacher": {"source": "cached", "cache": CACHE}}),
    "mixture, LoRA on its experts": (MIXTURE, BASE | {"adapter": {"method": "lora", "rank": 4}}),
    "another model on DeepSpeed as teacher": (LLAMA, DEEPSPEED),
    "another mixture on DeepSpeed as teacher": (MIXTURE, DEEPSPEED),
    "optimizer on the host": (LLAMA, {"optimizer": {"offload": "cpu"}}),
    "IPO": (LLAMA, {"loss": {"target": "none"}, "align": {"method": "dpo", "loss": "ipo"}}),
}
TEXTS = ["the heron waits"]  # what all tokenizers are trained on: a model's must be the data's
SMALL = ("swapped teacher",)
AT_ONCE = 8
CASE_SECONDS = 90.0


def run(findings: Findings, *, small: bool) -> None:
    names = SMALL if small else tuple(CASES)
    findings.plan(*names)
    with tempfile.TemporaryDirectory() as folder:
        mix = write_mix(Path(folder) / "data", seq_length=64, train=12)
        pairs = write_mix(Path(folder) / "pairs", seq_length=64, train=12)
        add_pairs(pairs)
        for data in (mix, pairs):
            save_tiny_tokenizer(TEXTS, data.parent / "tokenizer")
        with ThreadPoolExecutor(min(AT_ONCE, max(1, (os.cpu_count() or 1) // 2))) as pool:
            for name in names:
                mixture = pairs if CASES[name][1].get("align", {}).get("method") == "dpo" else mix
                pool.submit(_try, findings, name, mixture, Path(folder))


def _try(findings: Findings, name: str, mix: Path, parent: Path) -> None:
    with findings.tried(name) as values:
        arch, sections = CASES[name]
        folder = parent / name.replace(" ", "_")
        teacher = sections.get("teacher", {})
        if teacher.get("source") == "deepspeed" and find_spec("deepspeed") is None:
            raise LeftOut("deepspeed is not installed")
        torch.manual_seed(0)
        for model in ("model", TEACHER) if "hf" in teacher else ("model",):
            write_model(arch, folder / model, torch.float32, lambda name, shape: 0.02 * torch.randn(shape))
            save_tiny_tokenizer(TEXTS, folder / model)
        beside = {key: str(folder / teacher[key]) for key in ("cache", "hf") if key in teacher}
        sections = sections | {"teacher": teacher | beside}
        configuration = {
            "model": {"hf": str(folder / "model")},
            "data": {"mix": str(mix)},
            "run_dir": str(folder / "run"),
            **sections,
            "train": {"steps": 100, "micro_batch_size": 2, "global_batch_size": 4, **sections.get("train", {})},
        }
        (folder / "train.yaml").write_text(yaml.safe_dump(configuration))
        commands = [["certify", "--device", os.environ["MIXCPT_DEVICE"]]]
        if teacher.get("source") == "cached":
            commands.insert(0, ["cache-teacher"])
        seconds = 0.0
        for words in commands:
            command = [sys.executable, "-m", "megatron_mixcpt.cli", words[0], str(folder / "train.yaml"), *words[1:]]
            ended = run_within(CASE_SECONDS, [*command, "--nproc", "1"], folder / "log", {"OMP_NUM_THREADS": "1"})
            output = (folder / "log").read_text(errors="replace")
            if not ended.well:
                print(f"---- {name}: {ended.how}\n{output}", flush=True)
                raise RuntimeError(f"{ended.how}: {_told(output)}")
            seconds += ended.seconds
        values |= _shares(folder / "run") | {"seconds": seconds}


def _told(output: str) -> str:
    """The line that says what was wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [number for number, line in enumerate(lines) if "error" in line.lower()]
    return " / ".join(lines[errors[0] : errors[0] + 3] if errors else lines[-3:])[:500]


def _shares(folder: Path) -> dict[str, float]:
    """How much of its bound the largest error takes, by dtype."""
    certificate = read_certificate(folder)
    assert certificate is not None
    shares: dict[str, float] = {}
    for row in certificate.measured:
        column = f"{row['dtype']} error / bound"
        shares[column] = max(shares.get(column, 0.0), row["error"] / row["bound"] if row["bound"] else 0.0)
    return shares
