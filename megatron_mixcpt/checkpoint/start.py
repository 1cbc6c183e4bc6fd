"""Starting weights where adapters are involved: fresh ones, an adapter directory, or a run that has trained some.

A checkpoint of such a run holds its adapters alone. The weights they belong to come from where that run took them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.utils import unwrap_model

from megatron_mixcpt.checkpoint.info import CheckpointInfo, read_info
from megatron_mixcpt.checkpoint.manifest import fingerprint
from megatron_mixcpt.checkpoint.state import load_weights
from megatron_mixcpt.checkpoint.verify import find_checkpoint, silent, warn
from megatron_mixcpt.config import AdapterConfig
from megatron_mixcpt.errors import ConfigError

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
    tell = warn if torch.distributed.get_rank() == 0 else silent
    checkpoint = find_checkpoint(run_or_checkpoint, trust=trust, tell=tell, together=True)
    stage, info = unwrap_model(model), read_info(checkpoint)
    if info.adapter is not None:
        _load_adapted(stage, checkpoint, info, info.adapter)
    else:
        load_weights(stage, checkpoint)
    return fingerprint(checkpoint)


def _load_adapted(stage: StageModel, checkpoint: Path, info: CheckpointInfo, trained: AdapterConfig) -> None:
    """Fill a stage from a verified checkpoint that holds adapters: base weights first, then the adapters. Collective.

    A stage with adapters of the same shape goes on with them. Into any other stage LoRA is merged.

    Raises ConfigError where the base is gone, or where ALoRA would have to be merged.
    """
    from megatron_mixcpt.adapters.state import load_adapters
    from megatron_mixcpt.architecture.init import initialize
    from megatron_mixcpt.checkpoint.origin import check_start, goes_on, run_config
    from megatron_mixcpt.model.load import load_hf
    from megatron_mixcpt.model.place import place_here

    same = goes_on(trained, stage.adapter)
    if not same and trained.method == "alora":
        raise ConfigError(f"{checkpoint}: {not_mergeable(trained)}")
    if same and stage.adapter is not None and stage.adapter.init:
        raise ConfigError(
            f"adapter.init: model.checkpoint {checkpoint} has adapters to go on with: remove one of the two"
        )
    config = run_config(checkpoint)
    model = config.model
    check_start(checkpoint, info, model)
    if model.hf:
        load_hf(stage, model.hf)
    elif model.checkpoint:
        load_model_weights(stage, Path(model.checkpoint))
    else:
        initialize(stage.slots(), stage.arch, config.train.seed, place_here())
    if same:
        load_adapters(stage.adapters(), checkpoint)
    else:
        _merge(stage, trained, checkpoint)


def not_mergeable(adapter: AdapterConfig) -> str:
    """Why the weights of a run with ALoRA cannot stand alone."""
    return (
        "ALoRA cannot be merged into the weights: its attention takes in preceding tokens, which no matrix does. "
        f"Go on with the same adapter section ({', '.join(f'{k}={v}' for k, v in adapter.shape.items())}), or take it "
        "as it is with `mixcpt export --adapter`"
    )


@torch.no_grad()
def _merge(stage: StageModel, trained: AdapterConfig, checkpoint: Path) -> None:
    """Add a checkpoint's LoRA to the weights, in fp32."""
    from megatron_mixcpt.adapters.layers import new_adapter
    from megatron_mixcpt.adapters.layout import adapted_linears
    from megatron_mixcpt.adapters.state import load_adapters
    from megatron_mixcpt.model.place import place_here

    layers: dict[int, Any] = {}
    for part in stage.parts:
        layers |= dict(enumerate(part.decoder.layers, start=part.first_layer))
    beside = []
    for layout in adapted_linears(stage.arch, trained):
        _, _, number, rest = layout.linear.split(".", 3)
        if int(number) in layers:
            weight = layers[int(number)].get_submodule(rest).weight
            beside.append((weight, new_adapter(layout, stage.config, place_here())))
    load_adapters([adapter for _, adapter in beside], checkpoint)
    for weight, adapter in beside:
        weight.copy_(weight.float() + adapter.merged_delta())
