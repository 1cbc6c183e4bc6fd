"""What the oracle knows of mixtures of experts: how transformers holds them, adapters on them, what their routers say,
their losses.

Shapes: t tokens, e experts, k experts of a token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mixcpt.certify.documents import Document
from megatron_mixcpt.certify.formulas import balance, z_loss
from megatron_mixcpt.config import TrainConfig
from megatron_mixcpt.errors import MixcptError

CLEAR = 4.0
"""Times the rounding of its scores by which a token's experts must lead the others, so that rounding tips no choice."""
_EXPERT = re.compile(r"(model\.layers\.\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight")
_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}  # as Mixtral's files call them


def parameters_of(weights: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The parameters `names` of transformers' model, from tensors under the names that they have in files.

    From its version 5 on transformers stacks a layer's experts, the gate above the up projection, and calls Mixtral's
    parts as those of others.
    """
    if all(name in weights for name in names):
        return {name: weights[name] for name in names}
    known: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, weight in weights.items():
        if found := _EXPERT.fullmatch(name):
            layer, number, part = found.groups()
            parts.setdefault(f"{layer}.mlp.experts.{_PARTS.get(part, part)}", {})[int(number)] = weight
        else:
            known[name.replace(".block_sparse_moe.", ".mlp.")] = weight
    stacked = {name: torch.stack([of[number] for number in sorted(of)]) for name, of in parts.items()}
    for name, gate in stacked.items():
        known[name] = gate
        if name.endswith(".gate_proj"):
            layer = name.removesuffix("gate_proj")
            known[f"{layer}gate_up_proj"] = torch.cat([gate, stacked[f"{layer}up_proj"]], 1)
    return {name: known[name] for name in names}


def is_expert(layer: str) -> bool:
    """Whether a layer, by its name in files, is one expert's."""
    return _EXPERT.fullmatch(f"{layer}.weight") is not None


def adapted_experts(weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """`weights`, and of each expert's layer that has an adapter W + `scale` B A; names as in files."""
    adapted = dict(weights)
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if is_expert(layer) and f"{layer}.lora_A.weight" in adapter:
            down, up = adapter[f"{layer}.lora_A.weight"], adapter[f"{layer}.lora_B.weight"]
            adapted[name] = weight + scale * (up @ down)
    return adapted


class Routers:
    """The routers of transformers' model, which say what they see in every pass."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: list[Tensor] = []
        self._per_token = getattr(model.config, "num_experts_per_tok", 0)
        for name, module in model.named_modules():
            if name.endswith(".gate"):
                module.register_forward_pre_hook(self._see)

    def _see(self, router: Any, inputs: tuple[Tensor]) -> None:
        self._seen.append(F.linear(inputs[0].flatten(0, -2), router.weight))

    def take(self, documents: list[Document]) -> list[Tensor]:
        """Logits `[t, e]` of each layer in the pass since the last time, of the documents' tokens one after another."""
        lengths = torch.tensor([len(of.tokens) for of in documents])
        meant = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).flatten()
        seen = [logits[meant] for logits in self._seen]
        self._seen.clear()
        return seen

    def losses(self, logits: list[Tensor], documents: list[Document], train: TrainConfig) -> Tensor:
        """What a trained router's are, of all layers: balance is that of a micro-batch, and both are means over tokens
        of whatever kind, padding's too. `logits`: as `take` returns them."""
        samples = torch.repeat_interleave(
            torch.tensor([of.sample for of in documents]), torch.tensor([len(of.tokens) for of in documents])
        )
        micro_batches = samples // train.micro_batch_size
        total = logits[0].new_zeros(())
        for of_layer in logits:
            of_layer = of_layer if of_layer.dtype == torch.float64 else of_layer.float()
            total = total + train.router_z * z_loss(of_layer)
            for number in micro_batches.unique():
                mine = of_layer[micro_batches == number]
                share = len(mine) / len(of_layer)
                total = total + train.router_balance * share * balance(mine, self._per_token)
        return total

    def check_choices(self, exact: list[Tensor], plain: list[Tensor]) -> None:
        """Raise MixcptError where rounding may tip a choice of experts: nothing could be compared then.

        Args:
            exact, plain: logits `[t, e]` in fp64 and in the dtype of the run.
        """
        for right, rounded in zip(exact, plain):
            if self._per_token >= right.shape[1]:
                continue
            ordered = right.sort(-1, descending=True).values
            lead = float((ordered[:, self._per_token - 1] - ordered[:, self._per_token]).min())
            rounding = float((rounded.double() - right).abs().max())
            if not lead > CLEAR * rounding:
                raise MixcptError(
                    f"certify: a token's choice of experts hangs on rounding in the small model: {lead:.2g} between "
                    f"the scores of two experts, which rounding moves by {rounding:.2g}: set another train.seed"
                )
