"""What a study's file holds: arms, learning rates, seeds, what is measured, and the rule that chooses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_mixcpt.config.section import NonNegative, Positive, Section, Weight

ArmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]+$")]
Rate = Annotated[float, Field(gt=0.0)]
RATES = "lr"
"""The key of an arm that is no setting of the training file: learning rates of its own."""
OF_THE_STUDY = {
    "train.lr": "give the arm its own learning rates by `lr: [...]`",
    "train.seed": "see seeds",
    "run_dir": "see out",
}
"""Settings that an arm cannot lay over the training file's, and what to do instead."""


class MeasureConfig(Section):
    """What is measured of every model, as `mixcpt eval` measures it."""

    mix: str | None = None
    """mix.json whose held-out text is measured; None: the training file's."""
    tasks: list[str] = Field(default=[])
    """`bundled`, task files, or names that the harness knows."""
    gci: str | None = None
    """File of questions, or facts[:PEOPLE[:SEED]]."""
    chat: bool = False
    """Put these questions into the model's chat template."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of weights and arithmetic."""
    micro_batch_size: Positive = 1
    """Sequences at once; does not change the result."""
    max_samples: Positive | None = None
    """Sequences a source, and questions a task; None: all."""


class WithinConfig(Section):
    """What a model may cost."""

    forgetting: Weight | None = None
    """Most that the loss on all sources but the domain's may rise over the base model's, in nats a token."""
    tasks: Weight | None = None
    """Most that the mean accuracy of the tasks may fall."""


class ChooseConfig(Section):
    """The rule that chooses each arm's learning rate, and its average with the base: the highest gain of those within;
    where none is, the one that forgets least."""

    gain: Literal["domain", "facts", "both"] = "domain"
    """domain: fall of the loss on domain sources, in nats a token; facts, both: share of the questions of measure.gci
    with the fact right, with fact and skill right."""
    within: WithinConfig = WithinConfig()
    averages: bool = True
    """Whether the averages of `average` are to choose from too; else whole runs alone."""


class Study(Section):
    """`mixcpt study`."""

    base: str
    """Training file that every arm lays its own settings over."""
    arms: Annotated[dict[ArmName, dict[str, Any]], Field(min_length=1)]
    """By name: settings laid over the training file's, as `{loss.target: none, adapter: {method: lora}}`; `lr`, a list,
    in place of the study's."""
    lr: Annotated[list[Rate], Field(min_length=1)]
    """Learning rates that each arm is tried at, with the first seed."""
    seeds: Annotated[list[NonNegative], Field(min_length=1)] = Field(default=[1, 2, 3])
    """Seeds of the order of the data; all of them at each arm's chosen learning rate."""
    average: list[Annotated[float, Field(gt=0.0, lt=1.0)]] = Field(default=[])
    """Averages (1 - alpha) base + alpha tuned of every run that are measured too."""
    measure: MeasureConfig = MeasureConfig()
    choose: ChooseConfig = ChooseConfig()
    nproc: Positive = 1
    """Ranks of a run."""
    keep_checkpoints: bool = True
    """False: a run's checkpoints go when it is measured; what is to be measured later trains it again."""
    out: str
    """Folder of the study. The same folder goes on."""

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        rates = {"": self.lr} | {f"arms.{name}.": arm[RATES] for name, arm in self.arms.items() if RATES in arm}
        for prefix, values in rates.items():
            if not isinstance(values, list) or not values or not all(_is_rate(value) for value in values):
                raise ValueError(f"{prefix}lr: a list of learning rates above 0")
            if len({float(value) for value in values}) < len(values):
                raise ValueError(f"{prefix}lr: a learning rate is given twice")
        for name, arm in self.arms.items():
            for key, instead in OF_THE_STUDY.items():
                section, _, last = key.rpartition(".")
                if key in arm or (section and last in (arm.get(section) or {})):
                    raise ValueError(f"arms.{name}: {key} is the study's: {instead}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: a seed is given twice")
        if self.choose.gain != "domain" and self.measure.gci is None:
            raise ValueError(f"choose.gain {self.choose.gain} is a share of the questions of measure.gci: give them")
        if self.choose.within.tasks is not None and not self.measure.tasks:
            raise ValueError("choose.within.tasks needs measure.tasks")
        return self

    def rates(self, arm: str) -> list[float]:
        """Learning rates of an arm."""
        return [float(rate) for rate in self.arms[arm].get(RATES, self.lr)]


def _is_rate(value: Any) -> bool:
    try:
        return float(value) > 0.0
    except (TypeError, ValueError):
        return False
