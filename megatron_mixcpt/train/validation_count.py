"""How often a run measures its held-out text, and how much of it."""

from __future__ import annotations

from megatron_mixcpt.config import Config
from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.train.concluding import ALPHAS


def num_validations(config: Config) -> int:
    """Passes over the held-out text of a run that is not resumed, with those of `forget.average`."""
    every = [config.eval.every]
    if config.forget is not None:
        every += [config.forget.every, config.checkpoint.every]
    steps = {0, config.train.steps}
    steps |= {step for number in every if number for step in range(number, config.train.steps, number)}
    averages = len(ALPHAS) if config.forget is not None and config.forget.average else 0
    return len(steps) + averages


def validated_sequences(config: Config, mix: Mix) -> int:
    """Held-out sequences of one pass: of each source `eval.max_samples`, or all it has."""
    held_out = [source.valid.sequences for source in mix.sources if source.valid]
    return sum(min(count, config.eval.limit or count) for count in held_out)
