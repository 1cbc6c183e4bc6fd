"""The end of a run with a forgetting budget: which checkpoint is its result.

That is the one that learned most among those within the budget. With `forget.average` the points between the starting
weights and those at the end of the training are measured too, (1 - alpha) start + alpha end, as WiSE-FT (arXiv
2109.01903) takes them: where the end is beyond the budget, one of them may keep it and have learned more.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from megatron_mixcpt.checkpoint import save_checkpoint
from megatron_mixcpt.checkpoint.store import choose_result, list_checkpoints, step_of
from megatron_mixcpt.config import Config
from megatron_mixcpt.errors import StoppedError
from megatron_mixcpt.observe.names import RESULT
from megatron_mixcpt.runtime.first_rank import from_first
from megatron_mixcpt.train.bookkeeping import Bookkeeping
from megatron_mixcpt.train.forgetting import Forgetting
from megatron_mixcpt.train.setup import Components, build_stage, load_start
from megatron_mixcpt.train.validation import RunValidation

ALPHAS = (0.25, 0.5, 0.75)
AVERAGES = "average"  # folder of the run with the averaged weights, from which no training goes on


def conclude(
    config: Config, components: Components, bookkeeping: Bookkeeping, forgetting: Forgetting, evaluate: RunValidation
) -> None:
    """Make `latest.json` name the result. Collective; nothing to do without a budget.

    Raises StoppedError where a stop came while averages were measured.
    """
    if config.forget is None:
        return
    parent = Path(config.run_dir) / "checkpoints"
    existing = from_first(lambda: list_checkpoints(parent))
    kept = [path for path in existing if step_of(path) == forgetting.best_step]
    result = kept[0] if kept else existing[0]
    described: dict[str, Any] = {"budget": config.forget.budget, "within": bool(kept)}
    if kept and forgetting.best:
        described |= {"forgotten": forgetting.best.forgotten, "gain": forgetting.best.gain}
    text = f"step {step_of(result)}, which learned most within the budget of {config.forget.budget:g}"
    if not kept:
        text = f"step {step_of(result)}, the newest: no checkpoint kept the budget of {config.forget.budget:g}"
    if config.forget.average:
        measured = _best_average(config, components, bookkeeping, forgetting, evaluate, within=bool(kept))
        if measured is not None:
            alpha, end = measured["alpha"], step_of(existing[0])
            text = f"{alpha:g} x step {end} + {1 - alpha:g} x the starting weights"
            described |= measured | {"within": True}
            result = _save_average(parent, components, bookkeeping, end)
    from_first(lambda: choose_result(parent, result, described))
    bookkeeping.concluded(f"{RESULT}{text}; latest.json names it, and `mixcpt export` takes it")


def _best_average(
    config: Config,
    components: Components,
    bookkeeping: Bookkeeping,
    forgetting: Forgetting,
    evaluate: RunValidation,
    *,
    within: bool,
) -> dict[str, float] | None:
    """The average that learned most within the budget: alpha, its share of the end, and what was measured of it. None
    where none beats the best checkpoint. The model, which is at the end of its training, then holds that average."""
    assert config.forget is not None
    stage = unwrap_model(components.model)
    parameters, end = list(stage.parameters()), _on_host(stage)
    # Read into the model itself: gradients, optimizer and teacher may have left no room for another.
    start = stage if load_start(stage, config) else build_stage(config, components.arch).model
    ends = list(zip(parameters, _on_host(start), end))
    del start
    best: dict[str, float] | None = None
    most = forgetting.best.gain if within and forgetting.best else -math.inf
    for alpha in ALPHAS:
        _mix(ends, alpha)
        _, items, stopping = evaluate.measure(f"the average with {alpha:g} of the end")
        if stopping:
            raise StoppedError("stopped while averages were measured: run the same command to go on")
        forgotten, gain = forgetting.compared(items)
        bookkeeping.message(f"average with {alpha:g} of the end: forgotten {forgotten:.4f}, learned {gain:.4f}")
        if forgotten <= config.forget.budget and gain > most:
            best, most = {"alpha": alpha, "forgotten": forgotten, "gain": gain}, gain
    _mix(ends, best["alpha"] if best else 1.0)
    return best


def _on_host(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().to("cpu", copy=True) for parameter in model.parameters()]


@torch.no_grad()
def _mix(ends: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], alpha: float) -> None:
    for parameter, start, end in ends:
        parameter.copy_(torch.lerp(start.float(), end.float(), alpha))


def _save_average(parent: Path, components: Components, bookkeeping: Bookkeeping, step: int) -> Path:
    """Weights alone; an earlier average is replaced."""
    folder = parent.parent / AVERAGES
    from_first(lambda: shutil.rmtree(folder, ignore_errors=True))
    return save_checkpoint(folder, step, components.model, training=bookkeeping.training_state())
