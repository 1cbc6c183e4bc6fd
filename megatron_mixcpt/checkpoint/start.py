"""Starting weights where adapters are involved: fresh ones, an adapter directory, or a run that has trained some.

A checkpoint of such a run holds its adapters alone. The weights they belong to come from where that run took them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from megatron.core.utils import unwrap_model

from megatron_mixcpt.checkpoint.info import read_info
from megatron_mixcpt.checkpoint.manifest import fingerprint
from megatron_mixcpt.checkpoint.state import load_weights
from megatron_mixcpt.checkpoint.verify import find_checkpoint, silent, warn
from megatron_mixcpt.config import AdapterConfig
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.runtime.watchdog import alive

if TYPE_CHECKING:
    from megatron_mixcpt.model.interleaved import StageModel


def start_adapters(stage: StageModel, seed: int) -> None:
    """Fill the adapters of a stage at the beginning of a run: from `adapter.init`, or so that they add nothing."""
    from megatron_mixcpt.adapters.files import read_directory

    assert stage.adapter is not None
    if stage.adapter.init is None:
        for adapter in stage.adapters():
            adapter.initialize(seed)
        return
    tensors = read_directory(Path(stage.adapter.init), stage.arch, stage.adapter)
    for adapter in stage.adapters():
        for name in adapter.layout.tensors():
            adapter.fill(name, tensors[adapter.layout.key(name)])


def load_model_weights(model: torch.nn.Module, run_or_checkpoint: Path, *, trust: bool = False) -> str | None:
    """Fill this rank's shard from a checkpoint or the newest one of a run, in any layout, whatever it trained.

    Collective. Verifies first; `trust` and errors as in `find_checkpoint`.

    Returns:
        what tells these weights from others (`manifest.fingerprint`).
    """
    from megatron_mixcpt.adapters.state import load_adapters
    from megatron_mixcpt.checkpoint.origin import goes_on

    checkpoint = _verified(run_or_checkpoint, trust=trust)
    stage, trained = unwrap_model(model), read_info(checkpoint).adapter
    same = goes_on(trained, stage.adapter)
    if same and stage.adapter.init:
        raise ConfigError(
            f"adapter.init: model.checkpoint {checkpoint} has adapters to go on with: remove one of the two"
        )
    if trained is not None and stage.adapter is not None and not same and torch.distributed.get_rank() == 0:
        warn(f"the LoRA of {checkpoint} is merged into the weights: it is of another adapter section than this run's")
    _load_beneath(stage, checkpoint, stage.adapter)
    if same:
        load_adapters(stage.adapters(), checkpoint)
    return fingerprint(checkpoint)


def _verified(run_or_checkpoint: Path, *, trust: bool = False) -> Path:
    tell = warn if torch.distributed.get_rank() == 0 else silent
    return find_checkpoint(run_or_checkpoint, trust=trust, tell=tell, together=True)


def _load_beneath(stage: StageModel, checkpoint: Path, adapter: AdapterConfig | None) -> None:
    """Fill the weights that a run with `adapter` has, or had, beside it where it starts from a verified checkpoint.

    Of a checkpoint with adapters of the same shape these are its own base: the run goes on with the adapters. In any
    other run's weights LoRA is merged. Collective.

    Raises ConfigError where the base is gone, or where ALoRA would have to be merged.
    """
    from megatron_mixcpt.architecture.init import initialize
    from megatron_mixcpt.checkpoint.origin import check_start, goes_on, run_config
    from megatron_mixcpt.model.load import load_hf
    from megatron_mixcpt.model.place import place_here

    info = read_info(checkpoint)
    if info.adapter is None:
        load_weights(stage, checkpoint)
        return
    same = goes_on(info.adapter, adapter)
    if not same and info.adapter.method == "alora":
        raise ConfigError(f"{checkpoint}: {not_mergeable(info.adapter)}")
    config = run_config(checkpoint)
    model = config.model
    check_start(checkpoint, info, model)
    if model.hf:
        load_hf(stage, model.hf)
    elif model.checkpoint:
        _load_beneath(stage, _verified(Path(model.checkpoint)), info.adapter)
    else:
        initialize(stage.slots(), stage.arch, config.train.seed, place_here())
    if not same:
        _merge(stage, info.adapter, checkpoint)


def not_mergeable(adapter: AdapterConfig) -> str:
    """Why the weights of a run with ALoRA cannot stand alone."""
    return (
        "ALoRA cannot be merged into the weights: its attention takes in preceding tokens, which no matrix does. "
        f"Go on with the same adapter section ({', '.join(f'{k}={v}' for k, v in adapter.shape.items())}), or take it "
        "as it is with `mixcpt export --adapter`"
    )


@torch.no_grad()
def _merge(stage: StageModel, trained: AdapterConfig, checkpoint: Path) -> None:
    """Add a checkpoint's LoRA to the weights, in fp32 and from whole tensors, as `convert.weights` does."""
    from megatron_mixcpt.adapters.files import whole_delta
    from megatron_mixcpt.adapters.layout import adapted_linears
    from megatron_mixcpt.adapters.state import read_adapters
    from megatron_mixcpt.architecture.layout import shard
    from megatron_mixcpt.model.place import place_here

    here = {slot.name: slot.parameter for slot in stage.slots()}
    beside = [linear for linear in adapted_linears(stage.arch, trained) if f"{linear.linear}.weight" in here]
    tensors, place = read_adapters(checkpoint, beside), place_here()
    for linear in beside:
        name = f"{linear.linear}.weight"
        delta = shard(name, whole_delta(linear, tensors), place, stage.vocab_size)
        here[name].copy_(here[name].float() + delta.to(here[name].device))
        alive()
