"""What the ranks have seen, put together: tokens by sample, tensors whole, under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mixcpt.adapters.files import to_hf
from megatron_mixcpt.adapters.layout import adapted_linears
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.layout import is_of_experts, is_whole, unshard
from megatron_mixcpt.config import Config
from megatron_mixcpt.huggingface.names import hf_names, split


@dataclass
class Step:
    """One training step of a case.

    Attributes:
        rows: of each sample its source and the stored sequences in it.
        losses: of each sample those of its tokens `[s]`, or of its pairs `[n]`.
        teacher: of each sample the logits `[s, v]`, or the pairs' reference log-probabilities `[n, 2]`; empty without.
        gradients, weights: whole, by Hugging Face name; weights after the step.
        copies: of what the ranks should have alike, the largest difference, by name.
    """

    rows: dict[int, tuple[int, list[int]]] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    teacher: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    copies: dict[str, float] = field(default_factory=dict)


def read_case(folder: Path, config: Config, arch: Architecture) -> list[Step]:
    """The steps of a case whose ranks have written into `folder`."""
    ranks = [torch.load(path, weights_only=True) for path in sorted(folder.glob("rank_*.pt"))]
    assemble = _Assembly(config, arch, ranks)
    return [assemble.step(number) for number in range(len(ranks[0]["steps"]))]


class _Assembly:
    def __init__(self, config: Config, arch: Architecture, ranks: list[dict[str, Any]]) -> None:
        self._config, self._arch = config, arch
        # Of pipeline, tensor, context and data the last two are replicas.
        self._ranks = sorted(ranks, key=lambda rank: (rank["place"][3], rank["place"][2], *rank["place"][:2]))

    def step(self, number: int) -> Step:
        step = Step()
        for rank in self._ranks:
            seen = rank["steps"][number]
            step.norms.append(seen["norm"])
            step.rows |= {sample: (source, list(of)) for sample, (source, of) in seen["rows"].items()}
        self._tokens(step, number)
        for what in ("gradients", "weights"):
            setattr(step, what, self._whole(what, number, step.copies))
        return step

    def _tokens(self, step: Step, number: int) -> None:
        logits: dict[int, dict[int, Tensor]] = {}
        for rank in self._ranks:
            tensor_rank = rank["place"][1]
            seen = rank["steps"][number]
            for index, found in seen["micro_batches"].items():
                for row, sample in enumerate(seen["ids"][index]):
                    if "pair_rows" in found:
                        mine = found["pair_rows"] == row
                        self._keep(step, "loss", step.losses, sample, found["losses"][mine])
                        self._keep(step, "reference", step.teacher, sample, found["reference"][mine])
                        continue
                    places = found["places"][row] if "places" in found else slice(None)
                    length = self._length(found)
                    if tensor_rank == 0:
                        losses = step.losses.setdefault(sample, torch.full((length,), torch.nan))
                        losses[places] = found["losses"][row].float()
                    if "teacher" in found:
                        mine = found["teacher"][:, row]  # [s, v/tp]
                        shard = logits.setdefault(sample, {}).setdefault(
                            tensor_rank, torch.full((length, mine.shape[1]), torch.nan)
                        )
                        shard[places] = mine.float()
        for sample, shards in logits.items():
            step.teacher[sample] = torch.cat([shards[t] for t in sorted(shards)], 1)[:, : self._arch.vocab_size]

    def _length(self, found: Mapping[str, Tensor]) -> int:
        return found["losses"].shape[1] * self._config.parallel.context

    @staticmethod
    def _keep(step: Step, what: str, kept: dict[int, Tensor], sample: int, value: Tensor) -> None:
        before = kept.setdefault(sample, value)
        step.copies[what] = max(step.copies.get(what, 0.0), _apart(before, value))

    def _whole(self, what: str, number: int, copies: dict[str, float]) -> dict[str, Tensor]:
        """Whole tensors of the first replica; how far the others are from it goes into `copies`."""
        shards: dict[str, dict[tuple[int, int], Tensor]] = {}  # by expert and tensor rank
        for rank in self._ranks:
            for name, tensor in rank["steps"][number][what].items():
                place = rank["expert"] if is_of_experts(name) else 0, rank["place"][1]
                known = shards.setdefault(name, {}).setdefault(place, tensor)
                if known is not tensor:
                    _compare_copies(f"{what[:-1]} of {name}", [known, tensor], copies)
        whole: dict[str, Tensor] = {}
        if self._config.adapter is None:
            for name, parts in shards.items():
                if is_whole(name):
                    _compare_copies(f"{what[:-1]} of {name}", list(parts.values()), copies)
                expert_ranks = len({expert for expert, _ in parts})
                tensor = unshard(name, [parts[at] for at in sorted(parts)], self._arch.vocab_size, expert_ranks)
                whole |= dict(zip(hf_names(name, self._arch), split(name, tensor, self._arch)))
            return whole
        for linear in adapted_linears(self._arch, self._config.adapter):
            tensors = {}
            for name, (_, axis) in linear.tensors().items():
                key, of_each = linear.key(name), []
                parts = shards[key]
                for expert in sorted({expert for expert, _ in parts}):
                    pieces = [parts[at] for at in sorted(parts) if at[0] == expert]
                    if axis is None:
                        _compare_copies(f"{what[:-1]} of {key}", pieces, copies)
                    of_each.append(pieces[0] if axis is None else torch.cat(pieces, axis))
                tensors[key] = torch.cat(of_each)
            whole |= to_hf(linear, tensors)
        return whole


def _compare_copies(name: str, tensors: list[Tensor], copies: dict[str, float]) -> None:
    copies[name] = max([copies.get(name, 0.0), *(_apart(tensors[0], other) for other in tensors[1:])])


def _apart(first: Tensor, second: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    if first.numel() == 0:
        return 0.0
    scale = float(first.abs().max()) or 1.0
    return float((first.double() - second.double()).abs().max()) / scale
