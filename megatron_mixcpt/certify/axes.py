"""Which axis brings a mistake in: the same run with one axis switched off after the other."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mixcpt.certify.problem import Problem
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.rehearse.size import Grid

DATA = "data-parallel ranks"
ONE = "all of them"


@dataclass(frozen=True)
class Axis:
    """What can be switched off.

    Attributes:
        name: as the user knows it.
        off: values laid over the configuration's sections; None removes a section.
        within: of which axes it is a refinement, which may go off with one of them.
    """

    name: str
    off: Mapping[str, Mapping[str, Any] | None]
    within: tuple[str, ...] = ()


_SEQUENCE: Mapping[str, Any] = {"sequence": False}
_INTERLEAVE: Mapping[str, Any] = {"interleave": 1, "layers_per_stage": None}
_NO_TEACHER: Mapping[str, Mapping[str, Any]] = {
    "loss": {"target": "none", "fuse_lm_head": False},
    "teacher": {"source": "none", "cache": None, "hf": None, "offload": "none"},
}
LAYOUT = (
    Axis("parallel.sequence", {"parallel": _SEQUENCE}, ("parallel.tensor",)),
    Axis("parallel.interleave", {"parallel": _INTERLEAVE}, ("parallel.pipeline",)),
    Axis("parallel.layers_per_stage", {"parallel": {"layers_per_stage": None}}, ("parallel.pipeline",)),
    Axis("train.distributed_optimizer", {"train": {"distributed_optimizer": False}}),
    Axis("train.overlap_grad_reduce", {"train": {"overlap_grad_reduce": False}}),
    Axis("train.recompute", {"train": {"recompute": "none"}}),
    Axis("parallel.expert", {"parallel": {"expert": 1}}, (DATA, "parallel.context")),
    Axis("optimizer.offload", {"optimizer": {"offload": "none"}}),
    Axis("parallel.context", {"parallel": {"context": 1}}),
    Axis("parallel.pipeline", {"parallel": {"pipeline": 1, **_INTERLEAVE}}),
    Axis("parallel.tensor", {"parallel": {"tensor": 1, **_SEQUENCE}}),
    Axis(DATA, {}),
)
FUNCTION = (
    Axis("loss.fuse_lm_head", {"loss": {"fuse_lm_head": False}}, ("the teacher",)),
    Axis("adapter", {"adapter": None, "teacher": {"source": "initial"}}),
    Axis("forget", {"forget": None}, ("the teacher",)),
    Axis("the teacher", {**_NO_TEACHER, "forget": None}),
)
AXES = LAYOUT + FUNCTION


@dataclass(frozen=True)
class Variant:
    """The problem's run in other settings."""

    name: str
    values: dict[str, Any]
    config: Config
    ranks: int


def variants(problem: Problem, dtype: str) -> list[Variant]:
    """The run in `dtype` with each of the axes that are on switched off, and last with all those of the layout."""
    whole = whole_run(problem, dtype)
    found = []
    for axis in AXES:
        if axis.off == {"parallel": _INTERLEAVE} and whole.config.parallel.interleave == 1:
            continue  # it would take layers_per_stage off, which is an axis of its own
        variant = _without(problem, whole, [axis], axis.name)
        if variant is not None:
            found.append(variant)
    one = _without(problem, whole, list(LAYOUT), ONE)
    return found + ([one] if one is not None and len(found) > 1 else [])


def whole_run(problem: Problem, dtype: str) -> Variant:
    """The run as it is, in `dtype`."""
    values = copy.deepcopy(problem.values)
    values["train"]["dtype"] = dtype
    return _variant(problem, f"as it is, {dtype}", values, problem.grid)


def _without(problem: Problem, whole: Variant, axes: list[Axis], name: str) -> Variant | None:
    """None where the axes are off already, or where the run is none without them."""
    values, grid = copy.deepcopy(whole.values), problem.grid
    for axis in axes:
        for section, changes in axis.off.items():
            if section == "teacher" and axis.name == "adapter" and values["teacher"]["source"] != "adapter_off":
                continue
            values[section] = None if changes is None else {**(values[section] or {}), **changes}
        if axis.name == DATA:
            grid = dataclasses.replace(grid, data=1)
    layout = values["parallel"]
    grid = dataclasses.replace(grid, tensor=layout["tensor"], pipeline=layout["pipeline"], context=layout["context"])
    layout["expert"] = math.gcd(layout["expert"], grid.data * grid.context)  # the ranks that share experts
    try:
        variant = _variant(problem, name, values, grid)
    except ConfigError:
        return None
    same = _settings(variant) == _settings(whole) and grid == problem.grid
    return None if same else variant


def _settings(variant: Variant) -> dict[str, Any]:
    """Its values without places of its own."""
    return {**variant.values, "run_dir": "", "teacher": {**variant.values["teacher"], "cache": None}}


def _variant(problem: Problem, name: str, values: dict[str, Any], grid: Grid) -> Variant:
    folder = "".join(character if character.isalnum() else "_" for character in name)
    values["run_dir"] = str(problem.folder / "runs" / folder)
    if values["teacher"]["source"] == "cached":
        values["teacher"] = {**values["teacher"], "cache": f"{values['run_dir']}-cache"}
    return Variant(name, values, validate(Config, values, name), grid.world_size)


def blamed(cured: Mapping[str, bool]) -> str:
    """What brings the mistake in, in words. `cured`: of each variant, by name, whether it is without the mistake."""
    within = {axis.name: axis.within for axis in AXES}
    cures = [name for name, well in cured.items() if well and name != ONE]
    needed = [name for name in cures if not any(name in within[other] for other in cures)]
    if needed:
        return f"it appears with {' and '.join(needed)}"
    if not cured:
        return "it is there in one process, without any layout"
    if cured.get(ONE):
        return "each of several axes brings it in: it goes away only when all are off"
    return "it is no matter of the layout: it is there in one process too"
