"""The controller of a forgetting budget: decisions alone, from numbers that are the same on every rank.

One quantity, the *pressure*, is all that it moves. Up to a bound it is the logarithm of a factor on the distillation
weight, of a teacher that holds on to what the base model knew; beyond, that factor stays and the learning rate falls.
Dual ascent: the pressure rises while more is forgotten than is aimed at and falls while less is, so that it settles at
the least pressure that keeps the budget, which is where most is learned. That alone comes too late: forgetting adds up
what each step does, so that a pressure which adds up how much was forgotten swings beyond its aim. So a second part of
the pressure follows at once what is forgotten itself, as the penalty of an augmented Lagrangian does. Where even the
highest does not keep the budget, training ends.

Held-out losses are measured now and then, the divergence from the base model at every step. What is forgotten grows
with that divergence (arXiv 2509.04259), so that it tells between two measurements what the next one would find. Small
batches differ by chance; how much is learned from step to step, and only what is beyond it counts. It is a warning and
no finding: where it alone lowers the learning rate, a measurement is asked for at once.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

AIM = 0.8  # share of the budget that is aimed at: what is left is for what cannot be foreseen
# Factors on the configured distillation weight: with more of it a model of 135M forgot the domain again and no less of
# the rest, where a lower learning rate kept both.
WEIGHT_RANGE = 1 / 16, 4.0
LOWEST_RATE = 1 / 64  # factor on the scheduled learning rate
REACTION = math.log(256.0)  # what the pressure rises by as soon as another budget's worth is forgotten
ASCENT = math.log(4.0)  # what it rises by in the time between two measurements in which twice the budget is forgotten
SMOOTHING = 0.25  # of the time between two measurements: over what the divergence is averaged
SHORTEST_AVERAGE = 2  # steps, however short that time: single batches differ
DOUBT = 0.1  # of the budget: if more than that is expected beyond what was measured, it is worth a measurement,
EARLIEST = 0.25  # which comes no sooner than in this share of the time between two
UNSEEN = 2.0  # standard errors by which that average must have moved: what is below is the batches' chance
LARGEST_DEADBAND = 0.25  # of the budget: more noise cannot resolve it, and it is kept all the same
PATIENCE = 2  # measurements beyond the budget under the highest pressure, after which training ends
USUAL_RATIO = 0.5  # of what is forgotten to the divergence, as if it had been seen once,
USUAL_SHARE = 0.25  # over this share of the budget
TOLD = math.log(4.0)  # the pressure is told when it has moved so far


@dataclass
class _State:
    """Everything that a checkpoint keeps; JSON types."""

    pressure: float = 0.0
    told: float = 0.0  # the pressure that was told last
    measurements: int = 0
    forgotten: float = 0.0  # at the last measurement
    noise: float = 0.0
    step: int = 0  # of the last measurement
    steps: int = 0  # that were taken since
    dual: float = 0.0  # the part of the pressure that dual ascent moves; the rest follows what is forgotten
    divergence: float | None = None  # averaged over the last steps
    divergence_last: float | None = None  # of the last step alone,
    divergence_change: float | None = None  # and since the one before it
    variance: float = 0.0  # of a single step's divergence about what it would be over many batches
    divergence_measured: float = 0.0  # as it was at the last measurement
    products: float = 0.0  # running sums over the changes between two measurements, of forgotten x divergence
    squares: float = 0.0  # and divergence x divergence
    beyond: int = 0  # measurements in a row that were beyond the budget under the highest pressure
    best_step: int | None = None
    best_gain: float = -math.inf
    best_forgotten: float = 0.0


class Best(NamedTuple):
    """A checkpoint, and what was measured of it."""

    step: int
    gain: float
    forgotten: float


class BudgetController:
    """Keeps what is forgotten within a budget. `observed` after each step, `measured` after each measurement.

    Args:
        budget: nats a token.
        every: steps between two measurements.
        holds: whether more distillation means less forgetting. Without, the weight is never raised: a swapped teacher
            demotes the base model's choice at every token that it had wrong.
        state: what `state()` returned in the run that is resumed.
        allowance: how often the budget training may forget, where averaging gives back what is beyond it.
    """

    def __init__(
        self,
        budget: float,
        every: int,
        state: dict[str, Any] | None = None,
        *,
        holds: bool = True,
        allowance: float = 1.0,
    ) -> None:
        self._kept, self.budget, self.every = budget, allowance * budget, every
        self._turn = math.log(WEIGHT_RANGE[1]) if holds else 0.0  # the pressure from which on the learning rate falls
        self._state = _State(**(state or {}))

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
        """What a measurement would find now, by how far the divergence has moved since the last one."""
        return self._state.forgotten + self._ratio() * self._moved()

    @property
    def in_doubt(self) -> bool:
        """Whether to measure before it is due: the learning rate has fallen for what is only expected.

        The divergence also grows by what is learned, and until a measurement says so, hardly anything more is learned.
        """
        state = self._state
        foreseen = self.rate_factor < 1.0 and self.expected - state.forgotten > DOUBT * self.budget
        return foreseen and state.forgotten < AIM * self.budget and state.steps >= EARLIEST * self.every

    @property
    def exhausted(self) -> bool:
        """Whether the budget cannot be kept by anything but ending the training."""
        return self._state.beyond >= PATIENCE

    @property
    def best(self) -> Best | None:
        """Of the checkpoint that learned most within the budget."""
        state = self._state
        if state.best_step is None:
            return None
        return Best(state.best_step, state.best_gain, state.best_forgotten)

    def observed(self, divergence: float) -> str:
        """After a step that was taken: its tokens' divergence from the base model. What there is to tell, or ''."""
        state = self._state
        if math.isfinite(divergence):
            if state.divergence is None:
                state.divergence = state.divergence_measured = divergence
            state.divergence += self._share * (divergence - state.divergence)
            self._learn_chance(divergence)
        state.steps += 1
        self._move(1.0 / self.every)
        if abs(state.pressure - state.told) < TOLD:
            return ""
        return self._tell(f"the divergence from the base model is {state.divergence:.4f}")

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
        if not (math.isfinite(forgotten) and math.isfinite(noise) and math.isfinite(gain)):
            return f"what was measured at step {step} is no finite number: it changes nothing"
        rises = forgotten >= state.forgotten
        if forgotten > max(noise, state.forgotten):  # that general text is learned at first says nothing of later
            moved = max(self._moved(), 0.0)
            state.products = 0.5 * state.products + (forgotten - max(state.forgotten, 0.0)) * moved
            state.squares = 0.5 * state.squares + moved**2
        state.step, state.steps, state.forgotten, state.noise = step, 0, forgotten, noise
        state.measurements += 1
        state.divergence_measured = state.divergence or 0.0
        over = forgotten - noise > self.budget and rises and state.pressure >= self._highest()
        state.beyond = state.beyond + 1 if over else 0
        if candidate and forgotten <= self._kept and gain > state.best_gain:
            self._choose(Best(step, gain, forgotten))
        text = f"forgotten {forgotten:.4f} +- {noise:.4f} of {self.budget:g} nats a token"
        if self.budget != self._kept:
            text += " before averaging"
        if self.exhausted:
            return self._tell(f"{text}: the end, for no distillation weight and no learning rate keeps it")
        return self._tell(text)

    def unsaved(self, step: int, before: Best | None) -> None:
        """The checkpoint of `step` could not be written: the best one is that of `before`."""
        if self._state.best_step == step:
            self._choose(before)

    def asked_anew(self, *, measured_alike: bool) -> None:
        """The run goes on under another budget or learning rate, or unless `measured_alike` on other held-out text.

        It gets another chance, and its best checkpoint stays so only where it is within this budget too.
        """
        self._state.beyond = 0
        if not measured_alike or self._state.best_forgotten > self._kept:
            self._choose(None)

    def mixture_changed(self) -> None:
        """Another mixture has another divergence: it says nothing until it is measured against."""
        state = self._state
        state.divergence, state.divergence_measured, state.variance = None, 0.0, 0.0
        state.divergence_last = state.divergence_change = None
        state.products = state.squares = 0.0

    def state(self) -> dict[str, Any]:
        """JSON types; floats survive JSON exactly."""
        state = asdict(self._state)
        if state["best_step"] is None:
            state.pop("best_gain")  # JSON has no infinity
        return state

    def _choose(self, best: Best | None) -> None:
        state = self._state
        state.best_step, state.best_gain, state.best_forgotten = best or (None, -math.inf, 0.0)

    def _move(self, share: float) -> None:
        """Move the pressure for `share` of the time between two measurements."""
        state = self._state
        penalty = REACTION * max(self.expected, 0.0) / self.budget
        beyond = self.expected - AIM * self.budget
        deadband = min(state.noise, LARGEST_DEADBAND * self.budget)
        ascent = ASCENT * share * math.copysign(max(abs(beyond) - deadband, 0.0), beyond) / self.budget
        # What was forgotten hardly comes back: beyond the budget, that no more is, is no reason to let go.
        lowest = state.pressure if self.expected > self.budget else math.log(WEIGHT_RANGE[0])
        # Each by itself within its bounds: what the penalty could not add at one bound it must not take at the other.
        state.dual += min(ascent, ASCENT * share)
        state.dual = min(max(state.dual, math.log(WEIGHT_RANGE[0]) - penalty), self._highest())
        state.pressure = min(max(state.dual + penalty, lowest), self._highest())

    @property
    def _share(self) -> float:
        """Of the newest step in the average of the divergence."""
        return 1.0 / max(SMOOTHING * self.every, SHORTEST_AVERAGE)

    def _learn_chance(self, divergence: float) -> None:
        """By how much steps differ that should be alike: what grows evenly is no chance."""
        state = self._state
        change = None if state.divergence_last is None else divergence - state.divergence_last
        if change is not None and state.divergence_change is not None:
            single = (change - state.divergence_change) ** 2 / 6.0  # a second difference has six variances
            state.variance += self._share * (single - state.variance)
        state.divergence_last, state.divergence_change = divergence, change

    def _moved(self) -> float:
        """How far the divergence has moved since the last measurement, beyond what other batches would have done.

        Of two averages with the share s, each has the variance s / (2 - s) of a single step.
        """
        state = self._state
        moved = (state.divergence or 0.0) - state.divergence_measured
        chance = UNSEEN * math.sqrt(2.0 * state.variance * self._share / (2.0 - self._share))
        return math.copysign(max(abs(moved) - chance, 0.0), moved)

    def _ratio(self) -> float:
        """What is forgotten for each nat that the divergence grows."""
        usual = USUAL_SHARE * self.budget / USUAL_RATIO
        return (USUAL_RATIO * usual**2 + self._state.products) / (usual**2 + self._state.squares)

    def _highest(self) -> float:
        return self._turn - math.log(LOWEST_RATE)

    def _tell(self, why: str) -> str:
        text = f"{why}; expected {self.expected:.4f}: distillation weight x {self.weight_factor:.3g}"
        if self.rate_factor < 1.0:
            text += f", learning rate x {self.rate_factor:.3g}"
        self._state.told = self._state.pressure
        return text
