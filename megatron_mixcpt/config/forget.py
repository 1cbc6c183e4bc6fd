"""A budget of forgetting, and what a run needs to keep one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from megatron_mixcpt.config.section import Positive, Section

if TYPE_CHECKING:
    from megatron_mixcpt.config.schema import Config


class ForgetConfig(Section):
    """Training that keeps a budget of forgetting (docs/forgetting.md)."""

    budget: Annotated[float, Field(gt=0.0)]
    """Most that the held-out loss of each source in `on` may rise over its value before training, in nats a token."""
    on: list[str] = Field(default=[])
    """Sources, or kinds of data, that must not be forgotten; none named: all but the domain's."""
    every: Positive = 50
    """Steps between two measurements; one is also made before a checkpoint, and at the end."""
    average: bool = False
    """At the end, measure the averages of the result with the starting weights, and take the best within the budget."""


def check_budget(forget: ForgetConfig, config: Config) -> None:
    """Raise ValueError, naming the key and what to add, where the run cannot keep a budget."""
    if config.kind == "dpo":
        raise ValueError(
            "forget is kept through the weight of the distillation, which align.method dpo has not: remove it; "
            "align.beta ties the model to its start"
        )
    if not config.uses_teacher:
        raise ValueError(
            "forget.budget is kept through the weight of the distillation: set loss.target to swap, plain or mft, "
            "loss.kd_weight above 0 and teacher.source=initial"
        )
    if config.teacher.hf is not None and config.teacher.hf != config.model.hf:
        raise ValueError(
            f"forget: teacher.hf {config.teacher.hf} is not the model that is trained, and does not hold it to what it "
            "knew: remove teacher.hf, or forget"
        )
    if forget.average and config.adapter is not None:
        raise ValueError("forget.average averages whole weights, which adapter leaves as they are: remove one")
