"""A run's forgetting budget: what it measures, what it changes, and which checkpoint is the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron_mixcpt.checkpoint import TrainingState
from megatron_mixcpt.config import Config, ForgetConfig
from megatron_mixcpt.data.mix import Mix, Source
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.objectives.mixcpt import MixCPTLoss
from megatron_mixcpt.objectives.task import COUNT, Objective
from megatron_mixcpt.train.agreement import StepTotals
from megatron_mixcpt.train.budget import Best, BudgetController
from megatron_mixcpt.train.paired import Rise, rise

# Times the budget that training may forget with forget.average: half-way from the start SmolLM2-135M had 0.008, 0.12
# and 0.53 nats a token left of 0.24, 1.03 and 3.26, and most of what it had learned (docs/study.md).
AVERAGED = 6.0
FEWEST_ITEMS = 2  # held-out sequences of a source: one alone tells nothing about its noise
DOMAIN = "domain"


class Forgetting:
    """Measures, decides and applies, the same on every rank. Where `config.forget` is missing it does nothing.

    Args:
        objective: whose distillation weight is moved.
        saved: what the checkpoint that is resumed says, if any.

    Raises ConfigError where that checkpoint's measurements cannot be gone on from.
    """

    def __init__(self, config: Config, mix: Mix, objective: Objective, saved: TrainingState | None) -> None:
        self._settings, self._config, self._objective = config.forget, config, objective
        self._before: dict[str, list[list[float]]] = {}  # by source: each item's tokens and loss before training
        self._best_before: Best | None = None
        if config.forget is None:
            return
        assert isinstance(objective, MixCPTLoss), "no other has a distillation: the configuration is refused"
        self._weigh = objective.weigh
        self._held, self._learned = sources_of(config.forget, mix, config.eval.limit)
        order = f"seed {config.train.seed}, {config.eval.limit or 'all'}"
        self._content = {s.name: f"{s.valid.content}, {order}" for s in mix.sources if s.valid}
        state = _state_of(config, saved, self._content, [*self._held, *self._learned])
        self.controller = BudgetController(
            config.forget.budget,
            config.forget.every,
            state and state["controller"],
            holds=config.loss.target != "swap",
            allowance=AVERAGED if config.forget.average else 1.0,
        )
        self._asked = {
            **config.forget.model_dump(include={"budget", "average"}),
            "held": self._held,
            "lr": config.train.lr,
        }
        if state:
            self._before = state["before"]
            if state["asked"] != self._asked:
                self.controller.asked_anew(measured_alike=state["asked"]["held"] == self._held)
        kinds = {source.name: source.kind for source in mix.train_sources}
        domain = [name for name, kind in kinds.items() if kind == DOMAIN]
        self._sensed = [name in domain or not domain for name in kinds]  # of the rows of statistics
        self._apply()

    @property
    def rate_factor(self) -> float:
        """What the scheduled learning rate is multiplied by."""
        return self.controller.rate_factor if self._settings else 1.0

    @property
    def best(self) -> Best | None:
        """The checkpoint that would be the result now; it must not be removed."""
        return self.controller.best if self._settings else None

    @property
    def exhausted(self) -> bool:
        """Whether training ends because the budget cannot be kept otherwise."""
        return self._settings is not None and self.controller.exhausted

    def due(self, step: int, *, saves: bool = False) -> bool:
        """Whether to measure after `step` steps; `saves`: a checkpoint is due."""
        if self._settings is None:
            return False
        return saves or step % self._settings.every == 0 or self.controller.in_doubt

    def level(self, totals: StepTotals) -> float:
        """The step's loss for the guard against spikes: one that does not change with the distillation weight."""
        if self._settings is None:
            return totals.loss
        columns = [self._objective.statistics.index(name) for name in ("ce", "kd")]
        return sum(row[c] for row in totals.rows for c in columns) / max(sum(row[COUNT] for row in totals.rows), 1.0)

    def stepped(self, totals: StepTotals, *, taken: bool) -> tuple[dict[str, Any], str]:
        """After a step, `taken` or skipped: its metrics, and what there is to tell."""
        if self._settings is None:
            return {}, ""
        metrics: dict[str, Any] = {
            "forget/kd_weight": self._config.loss.kd_weight * self.controller.weight_factor,
            "forget/lr_factor": self.rate_factor,
        }
        column = self._objective.statistics.index("kl_base")
        rows = [row for row, sensed in zip(totals.rows, self._sensed) if sensed]
        count = sum(row[COUNT] for row in rows)
        message = ""
        if taken and count:
            message = self.controller.observed(sum(row[column] for row in rows) / count)
            self._apply()
        return metrics | {"forget/expected": self.controller.expected} | _told(message), message

    def measured(self, step: int, items: dict[str, Tensor], *, saves: bool) -> tuple[dict[str, Any], str]:
        """After a validation; `saves`: the checkpoint of this step is written, so that it can be the result.

        Args:
            items: by source, `[items, columns of the objective]`.
        """
        if self._settings is None:
            return {}, ""
        sums = self._sums(items)
        if step == 0:
            self._before = sums
            return {}, ""
        worst, forgotten, gain = self._since_the_start(sums)
        before = self.controller.best
        candidate = saves or not self._config.checkpoint.every  # where nothing says when, the best are saved
        message = self.controller.measured(step, forgotten.mean, forgotten.noise, gain, candidate=candidate)
        if self.controller.best != before:
            self._best_before = before
        message = f"{worst} {message}"
        self._apply()
        return {
            "forget/budget": self._settings.budget,
            "forget/forgotten": forgotten.mean,
            "forget/noise": forgotten.noise,
            "forget/gain": gain,
            **_told(message),
        }, message

    def compared(self, items: dict[str, Tensor]) -> tuple[float, float]:
        """(forgotten, gain) of the model that `items` were measured on; see `measured`."""
        _, forgotten, gain = self._since_the_start(self._sums(items))
        return forgotten.mean, gain

    def wants_saved(self, step: int) -> bool:
        """Whether the step just measured is the best so far."""
        return self.best_step == step

    @property
    def best_step(self) -> int | None:
        return self.best.step if self.best else None

    def mixture_changed(self) -> None:
        """The run goes on with other data, or other shares of it."""
        if self._settings is not None:
            self.controller.mixture_changed()

    def unsaved(self, step: int) -> None:
        """The checkpoint of `step` could not be written."""
        if self._settings is not None:
            self.controller.unsaved(step, self._best_before)

    def state(self) -> dict[str, Any] | None:
        """JSON types, for `checkpoint.json`."""
        if self._settings is None:
            return None
        return {
            "controller": self.controller.state(),
            "before": self._before,
            "content": self._content,
            "asked": self._asked,
        }

    def _apply(self) -> None:
        self._weigh(self._config.loss.kd_weight * self.controller.weight_factor)

    def _sums(self, items: dict[str, Tensor]) -> dict[str, list[list[float]]]:
        """By source: each item's tokens, and its loss."""
        columns = [self._objective.statistics.index(name) for name in ("tokens", "ce")]
        return {name: items[name][:, columns].t().tolist() for name in (*self._held, *self._learned)}

    def _since_the_start(self, sums: dict[str, list[list[float]]]) -> tuple[str, Rise, float]:
        """(the source that was forgotten most, how much, what was learned of the rest)."""
        rises = {name: rise(self._before[name][1], sums[name][1], sums[name][0]) for name in self._held}
        worst = max(self._held, key=lambda name: rises[name].mean)
        return worst, rises[worst], -self._pooled(sums)

    def _pooled(self, sums: dict[str, list[list[float]]]) -> float:
        """Rise of the loss over all items of what is to be learned."""
        before = [loss for name in self._learned for loss in self._before[name][1]]
        now = [loss for name in self._learned for loss in sums[name][1]]
        return rise(before, now, [tokens for name in self._learned for tokens in sums[name][0]]).mean


def _told(message: str) -> dict[str, str]:
    return {"forget/decision": message} if message else {}


def sources_of(settings: ForgetConfig, mix: Mix, max_samples: int | None) -> tuple[list[str], list[str]]:
    """(sources that must not be forgotten, sources that are to be learned), all with held-out data.

    What is to be learned is the domain, or where none is held out, all that is not named. Raises ConfigError naming the
    key, and what to add.
    """
    held_out = {source.name: source for source in mix.sources if source.valid}
    add = "preprocess again with a source of kind general, and a valid_fraction above 0"
    held = _named(settings.on, held_out, mix, add) if settings.on else _by_kind(held_out, DOMAIN, other=True)
    if not held:
        raise ConfigError(f"forget.budget: {mix.path} holds out no text but the domain's: {add}")
    for name in held:
        valid = held_out[name].valid
        if valid is None or min(valid.sequences, max_samples or valid.sequences) < FEWEST_ITEMS:
            raise ConfigError(
                f"forget.on: fewer than {FEWEST_ITEMS} held-out sequences of {name} are measured, which says nothing "
                "about the noise: raise eval.max_samples, or preprocess with a larger valid_fraction"
            )
    rest = {name: source for name, source in held_out.items() if name not in held}
    learned = _by_kind(rest, DOMAIN) or list(rest)
    if not learned:
        raise ConfigError(
            f"forget.on: {mix.path} holds out nothing beside {', '.join(held)}: which checkpoint learned most cannot "
            "be told; preprocess with a valid_fraction above 0 for the domain, or name less in forget.on"
        )
    return held, learned


def require_held(config: Config, mix: Mix) -> None:
    """Raise ConfigError where no distillation holds any text that is trained on: its weight would move nothing."""
    without = {kind for kind, weights in config.loss.by_kind.items() if weights.kd == 0.0}
    kinds = {source.kind for source in mix.train_sources}
    if kinds <= without:
        raise ConfigError(
            f"forget.budget is kept through the weight of the distillation, and loss.by_kind sets kd to 0 for all that "
            f"is trained on ({', '.join(sorted(kinds))}): give one of them more, or remove forget"
        )


def _named(entries: Sequence[str], held_out: dict[str, Source], mix: Mix, add: str) -> list[str]:
    """The sources that the entries name, or whose kind they name."""
    found: dict[str, None] = {}
    for entry in entries:
        names = [entry] if entry in held_out else _by_kind(held_out, entry)
        if not names:
            known = ", ".join(f"{source.name} ({source.kind})" for source in held_out.values()) or "nothing"
            raise ConfigError(
                f"forget.on: {entry} is no source of {mix.path} with held-out data, nor a kind of one; "
                f"it holds out {known}: name one of these, or {add}"
            )
        found |= dict.fromkeys(names)
    return list(found)


def _by_kind(sources: dict[str, Source], kind: str, *, other: bool = False) -> list[str]:
    """Names of the sources of a kind, or of all `other` ones."""
    return [name for name, source in sources.items() if (source.kind == kind) != other]


def _state_of(
    config: Config, saved: TrainingState | None, content: dict[str, str], needed: list[str]
) -> dict[str, Any] | None:
    """What the run that is resumed has kept; None for one that begins."""
    if saved is None:
        return None
    state = saved.forget
    if state is None:
        raise ConfigError(
            f"forget: {config.run_dir} was trained without a budget, and what its model knew before was not measured "
            "item by item: remove forget, or set another run_dir"
        )
    for name in needed:
        if name not in state["before"]:
            raise ConfigError(
                f"forget.on: {name} was not measured before training: set forget.on back, or another run_dir"
            )
        if state["content"].get(name) != content[name]:
            raise ConfigError(
                f"forget: the held-out sequences of {name} are not those that were measured before training: put back "
                "data.mix, train.seed and eval.max_samples, or set another run_dir"
            )
    return state
