"""The controller of a forgetting budget: decisions alone, from numbers that are the same on every rank.

One quantity, the *pressure*, is all that it moves. Up to a bound it is the logarithm of a factor on the distillation
weight, of a teacher that holds on to what the base model knew; beyond, that factor stays and the learning rate falls.
Dual ascent: the pressure rises while more is forgotten than is aimed at and falls while less is, so that it settles at
the least pressure that keeps the budget, which is where most is learned. Where even the highest does not keep it,
training ends.

Held-out losses are measured now and then, the divergence from the base model at every step. What is forgotten grows
with that divergence (arXiv 2509.04259), so that it tells between two measurements where the next one would come out.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

AIM = 0.8  # share of the budget that is aimed at: what is left is for what cannot be foreseen
WEIGHT_RANGE = (1 / 16, 64.0)  # factors on the configured distillation weight
LOWEST_RATE = 1 / 64  # factor on the scheduled learning rate
RAISE = math.log(16.0)  # most that the pressure rises between two measurements, as long as it is on the weight alone
LOWER = math.log(2.0)  # most that it falls
GAIN = math.log(4.0)  # how far it moves in that time where as much as the budget is forgotten beyond the aim, and the
# most that it rises on the learning rate
SMOOTHING = 0.25  # of the time between two measurements: over what the divergence is averaged
LARGEST_DEADBAND = (
    0.25  # of the budget: with more noise than that the budget cannot be resolved, and is kept all the same
)
PATIENCE = 2  # measurements beyond the budget under the highest pressure, after which training ends
USUAL_RATIO = 0.3  # of what is forgotten to the divergence, as if measured once where it would have used the budget
TOLD = math.log(2.0)  # the pressure is told when it has moved so far


@dataclass
class _State:
    """Everything that a checkpoint keeps; JSON types."""

    pressure: float = 0.0
    told: float = 0.0  # the pressure that was told last
    measurements: int = 0
    forgotten: float = 0.0  # at the last measurement
    noise: float = 0.0
    step: int = 0  # of the last measurement
    slope: float = (
        0.0  # change of what is forgotten in the time between two measurements, as it was between the last two
    )
    divergence: float | None = None  # averaged over the last steps
    divergence_measured: float = 0.0  # as it was at the last measurement
    products: float = 0.0  # running sums for the ratio of what is forgotten to the divergence
    squares: float = 0.0  # both begin with USUAL_RATIO
    beyond: int = 0  # measurements in a row that were beyond the budget under the highest pressure
    best_step: int | None = None
    best_gain: float = -math.inf
    notes: list[str] = field(default_factory=list)  # what was decided, for the report


class BudgetController:
    """Keeps what is forgotten within a budget. `observed` after each step, `measured` after each measurement.

    Args:
        budget: nats a token.
        every: steps between two measurements.
        holds: whether more distillation means less forgetting. Without, the weight is never raised: a swapped teacher
            demotes the base model's choice at every token that it had wrong.
        state: what `state()` returned in the run that is resumed.
    """

    def __init__(self, budget: float, every: int, state: dict[str, Any] | None = None, *, holds: bool = True) -> None:
        self.budget, self.every = budget, every
        self._turn = math.log(WEIGHT_RANGE[1]) if holds else 0.0  # the pressure from which on the learning rate falls
        self._state = _State(**state) if state else _State()
        if not self._state.squares:
            self._forget_the_ratio()

    @property
    def weight_factor(self) -> float:
        """What the configured distillation weight is multiplied by."""
        return math.exp(min(self._state.pressure, self._turn))

    @property
    def rate_factor(self) -> float:
        """What the scheduled learning rate is multiplied by."""
        return math.exp(-max(self._state.pressure - self._turn, 0.0))

    @property
    def expected(self) -> float:
        """What will have been forgotten when it is measured next, if nothing is changed."""
        state = self._state
        drift = self._ratio() * ((state.divergence or 0.0) - state.divergence_measured)
        return state.forgotten + drift + state.slope

    @property
    def exhausted(self) -> bool:
        """Whether the budget cannot be kept by anything but ending the training."""
        return self._state.beyond >= PATIENCE

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, gain) of the checkpoint that learned most within the budget."""
        return None if self._state.best_step is None else (self._state.best_step, self._state.best_gain)

    @property
    def notes(self) -> list[str]:
        return self._state.notes

    def observed(self, step: int, divergence: float) -> str:
        """After a step that was taken: its tokens' divergence from the base model. What there is to tell, or ''."""
        state = self._state
        if math.isfinite(divergence):
            share = min(1.0, 1.0 / (SMOOTHING * self.every))
            before = divergence if state.divergence is None else state.divergence
            state.divergence = before + share * (divergence - before)
        if not state.measurements:  # nothing was measured yet, so there is no reason to change anything
            return ""
        self._move(1.0 / self.every)
        if abs(state.pressure - state.told) < TOLD:
            return ""
        return self._tell(step, f"the divergence from the base model is {state.divergence:.4f}")

    def measured(self, step: int, forgotten: float, noise: float, gain: float, *, candidate: bool = True) -> str:
        """After a measurement on held-out items.

        Args:
            forgotten: rise of the loss since before the training, nats a token.
            noise: its standard error.
            gain: how much of the rest was learned, in any unit.
            candidate: whether there will be a checkpoint of this step.

        Returns:
            what there is to tell.
        """
        state = self._state
        steps = max(step - state.step, self.every / 2)  # of two that follow closely the noise would be blown up
        state.slope = (forgotten - state.forgotten) * self.every / steps
        if forgotten <= 0.0:  # that general text is learned at first does not say when forgetting begins
            state.slope = max(state.slope, 0.0)
        state.step, state.forgotten, state.noise = step, forgotten, noise
        state.measurements += 1
        if state.divergence is not None:
            state.divergence_measured = state.divergence
            state.products = 0.5 * state.products + max(forgotten, 0.0) * state.divergence
            state.squares = 0.5 * state.squares + state.divergence**2
        highest = self._highest()
        over = min(forgotten, self.expected) > self.budget and state.pressure >= highest
        state.beyond = state.beyond + 1 if over else 0
        if candidate and forgotten <= self.budget and gain > state.best_gain:
            state.best_step, state.best_gain = step, gain
        text = f"forgotten {forgotten:.4f} +- {noise:.4f} of {self.budget:g} nats a token"
        if self.exhausted:
            return self._tell(step, f"{text}: the end, for no distillation weight and no learning rate keeps it")
        return self._tell(step, text)

    def unsaved(self, step: int, before: tuple[int, float] | None) -> None:
        """The checkpoint of `step` could not be written: the best one is that of `before`."""
        if self._state.best_step == step:
            self._state.best_step, self._state.best_gain = before or (None, -math.inf)

    def mixture_changed(self) -> None:
        """Another mixture has another divergence: it says nothing until it is measured against."""
        state = self._state
        state.divergence, state.divergence_measured = None, 0.0
        self._forget_the_ratio()

    def state(self) -> dict[str, Any]:
        """JSON types; floats survive JSON exactly."""
        state = asdict(self._state)
        if state["best_step"] is None:
            state.pop("best_gain")  # JSON has no infinity
        return state

    def _move(self, share: float) -> None:
        """Move the pressure for `share` of the time between two measurements."""
        deadband = min(self._state.noise, LARGEST_DEADBAND * self.budget)
        error = self.expected - AIM * self.budget
        beyond = math.copysign(max(abs(error) - deadband, 0.0), error) / self.budget
        raising = RAISE
        if self._state.pressure >= self._turn:  # what is recovering needs its learning rate
            raising = GAIN if self.expected >= self._state.forgotten else 0.0
        step = min(max(GAIN * beyond, -LOWER), raising) * share
        lowest = math.log(WEIGHT_RANGE[0])
        self._state.pressure = min(max(self._state.pressure + step, lowest), self._highest())

    def _ratio(self) -> float:
        """What is forgotten for each nat of divergence."""
        return self._state.products / self._state.squares

    def _forget_the_ratio(self) -> None:
        """Before anything was forgotten nothing tells how fast it will be: the usual, until what is measured counts."""
        self._state.products, self._state.squares = self.budget**2 / USUAL_RATIO, (self.budget / USUAL_RATIO) ** 2

    def _highest(self) -> float:
        return self._turn - math.log(LOWEST_RATE)

    def _tell(self, step: int, why: str) -> str:
        state = self._state
        text = f"{why}; expected {self.expected:.4f}: distillation weight x {self.weight_factor:.3g}"
        if self.rate_factor < 1.0:
            text += f", learning rate x {self.rate_factor:.3g}"
        state.told = state.pressure
        state.notes.append(f"step {step}: {text}")
        return text
