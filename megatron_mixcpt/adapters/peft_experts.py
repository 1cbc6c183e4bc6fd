"""How PEFT calls the layers of an adapter, and how it stores those of experts.

transformers has had a linear layer for each expert (`mlp.experts.3.gate_proj`), and since version 5 one parameter for
all of them (`mlp.experts.gate_up_proj`). PEFT writes an adapter as the model is that it trained, and reads the first
form into either model: it puts the experts together, gate and up projection too, each under its own A. So the first is
written here, and both are read.

What PEFT 0.21 does on the way to transformers 5, and what follows:
- It takes every target that ends in the name of an expert's layer for the experts of all layers. A dense layer among
  them, which has the same name, is a `target_parameters` of its own, and stays what it is.
- It cannot put the gate and up projections where there is no down projection (layout.py refuses that).
- It refuses dropout beside parameters, in inference too. It is of no use there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_mixcpt.adapters.layout import AdaptedLinear, linear_layers
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.errors import VerificationError

# As transformers 5 has them in all families here; PEFT puts the wrapper of the second around that of the first.
_FUSED = {
    "linear_fc1": "model.layers.{}.mlp.experts.base_layer",
    "linear_fc2": "model.layers.{}.mlp.experts",
}


def peft_targets(arch: Architecture, linears: Iterable[AdaptedLinear]) -> dict[str, Any]:
    """Entries of PEFT's configuration that say what is adapted, and without dropout where PEFT bears none."""
    modules: list[str] = []
    parameters: list[str] = []
    experts = False
    for linear in linears:
        if arch.num_experts and ".mlp.linear_" in linear.linear:
            parameters += [f"{target}.weight" for target in linear.targets]
        else:
            modules += linear.targets
            experts = experts or linear.experts > 0
    entries: dict[str, Any] = {"target_modules": _short(modules, arch) if modules else None}
    if parameters:
        entries["target_parameters"] = parameters
    return entries | ({"lora_dropout": 0.0} if parameters or experts else {})


def _short(targets: list[str], arch: Architecture) -> list[str]:
    """In place of whole names their endings, where all layers of such an ending are adapted."""
    here = Counter(ending for target in targets for ending in _endings(target))
    there = Counter(ending for name in linear_layers(arch) for ending in _endings(name))
    short = {
        next((ending for ending in _endings(target) if here[ending] == there[ending]), target) for target in targets
    }
    return sorted(short)


def _endings(name: str) -> list[str]:
    """Shortest first: `gate_proj`, and of an expert `experts.3.gate_proj`."""
    last = name.rsplit(".", 1)[1]
    return [last, ".".join(name.rsplit(".", 3)[1:])] if ".experts." in name else [last]


def separate_experts(path: Path, stored: Mapping[str, Tensor], linears: Iterable[AdaptedLinear]) -> dict[str, Tensor]:
    """`stored` with matrices for each expert in place of those for all of them.

    Gate and up projection, which had one A, get a copy of it each: the same function.

    Raises VerificationError naming `path` where matrices have not the model's shape.
    """
    separate = dict(stored)
    for linear in linears:
        _, _, layer, *_, short = linear.linear.split(".")
        if not linear.experts or f"{_FUSED['linear_fc1'].format(layer)}.lora_A.weight" not in stored:
            continue
        experts, rank, parts = linear.experts, linear.config.rank, linear.projections
        rows = len(linear.row_targets())
        shapes = {"A": (experts * rank, linear.in_features), "B": (rows, rank * experts)}
        found = {}
        for name, expected in shapes.items():
            key = f"{_FUSED[short].format(layer)}.lora_{name}.weight"
            found[name] = separate.pop(key)
            if tuple(found[name].shape) != expected:
                raise VerificationError(f"{path}: {key} is {tuple(found[name].shape)}, this model takes {expected}")
        downs = found["A"].view(experts, rank, -1)
        ups = found["B"].view(rows, rank, experts).permute(2, 0, 1).chunk(parts, dim=1)  # each [experts, rows, r]
        for number, target in enumerate(linear.targets):
            expert, part = divmod(number, parts)
            separate[f"{target}.lora_A.weight"] = downs[expert]
            separate[f"{target}.lora_B.weight"] = ups[part][expert]
    return separate
