"""What a recall would take, from its configuration alone.

Times are arithmetic from the device's published peaks, for the case that every sample reaches its limit: a bound to
choose nodes by, no measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.recall.config import RecallConfig

BANDWIDTH = {"B200": 8.0e12, "H200": 4.8e12, "H100 PCIe": 2.0e12, "H100": 3.35e12, "A100": 2.0e12}
"""Bytes a second of device memory."""
DTYPE_BYTES = {"fp32": 4, "bf16": 2}
LOGITS_COPIES = 4  # fp32: as the model returns them, scaled, and what the choice works on


@dataclass(frozen=True)
class Cost:
    """Bytes on a rank, and amounts over all ranks."""

    num_parameters: int
    weights: int
    cache: int
    logits: int
    most_tokens: int
    steps: int
    """Passes through the model, one token for each of b samples."""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.logits


def most_tokens(config: RecallConfig) -> int:
    """Tokens that are drawn if every sample reaches its limits."""
    limits = config.sampling
    pair = limits.max_instruction_tokens + limits.max_answer_tokens
    return config.n.instructions * pair + config.n.text * limits.max_text_tokens


def estimate(config: RecallConfig) -> Cost:
    """For engine transformers. Raises ConfigError where the directory holds no model."""
    from transformers import AutoConfig

    from megatron_mixcpt.huggingface.weights import open_source

    engine = config.engine.transformers
    assert engine is not None
    try:
        model = AutoConfig.from_pretrained(config.model.hf).get_text_config()
        source = open_source(config.model.hf)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.hf: {config.model.hf}: transformers cannot open it: {error}") from error
    size = DTYPE_BYTES[engine.dtype]
    num_parameters = sum(math.prod(source.shape(name)) for name in source.names())
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    limits = config.sampling
    pair = limits.max_instruction_tokens + limits.max_answer_tokens if config.n.instructions else 0
    longest = max(pair, limits.max_text_tokens if config.n.text else 0)
    cache = 2 * model.num_hidden_layers * heads * head_dim * size * engine.batch_size * longest
    logits = LOGITS_COPIES * engine.batch_size * model.vocab_size * 4
    tokens = most_tokens(config)
    return Cost(num_parameters, num_parameters * size, cache, logits, tokens, math.ceil(tokens / engine.batch_size))


def hours(cost: Cost, device: str, peak: float, ranks: int, share: float) -> float:
    """At `share` of the device's peaks: a step reads weights and half of the full cache, or computes 2 FLOPs a weight
    and sample, whichever takes longer."""
    samples = cost.most_tokens / cost.steps
    seconds = max((cost.weights + cost.cache / 2) / BANDWIDTH[device], 2 * cost.num_parameters * samples / peak)
    return cost.steps * seconds / share / ranks / 3600


def described(config: RecallConfig, ranks: int, gpu: str | None, memory: float | None, share: float) -> list[str]:
    """Lines for `mixcpt plan`.

    Args:
        gpu: as `--gpu` names it; None takes an H100, and does not say whether it fits.
        memory: GiB of a rank's device, in place of the one that `gpu` has.
        share: of the device's peaks.

    Raises ConfigError for an unknown device.
    """
    from megatron_mixcpt.architecture.throughput import PEAK_BF16
    from megatron_mixcpt.plan.fitting import device, usable

    tokens = most_tokens(config)
    lines = [
        f"samples     {config.n.instructions} instructions, {config.n.text} texts: up to {tokens / 1e6:.1f} M tokens"
    ]
    if config.engine.transformers is None:
        return [*lines, "engine      a server computes; it knows what that takes"]
    name, of_device = device(gpu or "H100")
    cost, engine = estimate(config), config.engine.transformers
    lines += [
        f"model       {cost.num_parameters / 1e6:.1f} M parameters, {engine.dtype}, whole on each of {ranks} "
        f"rank{'s' * (ranks > 1)}",
        f"memory of a rank, GiB: weights {cost.weights / 2**30:.3f}, cache of {engine.batch_size} samples at their "
        f"limits {cost.cache / 2**30:.3f}, logits {cost.logits / 2**30:.3f}, total {cost.total / 2**30:.3f}",
        f"work        {2 * cost.num_parameters * tokens:.3g} FLOP, {cost.steps} steps of {engine.batch_size} samples",
    ]
    if gpu or memory:
        room, taken = memory or of_device, cost.total / 2**30
        fits = "fits" if taken <= usable(room) else "does not fit"
        lines.append(
            f"room        {fits}: {taken:.1f} of {room:g} GiB, {room - usable(room):.1f} of them left to libraries; "
            "engine.transformers.batch_size decides about cache and logits"
        )
    if engine.dtype == "bf16":
        time = hours(cost, name, PEAK_BF16[name], ranks, share)
        lines.append(
            f"time        at most {time:.2f} h at {share:.0%} of the peaks of {ranks} x {name} (arithmetic, not "
            "measured), every sample at its limit"
        )
    return lines
