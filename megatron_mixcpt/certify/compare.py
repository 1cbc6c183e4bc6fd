"""The trainer's steps held against the oracle's. Bounds are multiples of the error that plain torch makes.

Each thing is compared by itself, so that an error shows where it arises: losses and gradients at the very weights that
the trainer had, and what the optimizer makes of the very gradients it was given.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mixcpt.certify.documents import Rows
from megatron_mixcpt.certify.formulas import AdamW, learning_rate
from megatron_mixcpt.certify.observed import Step
from megatron_mixcpt.certify.oracle import Expected, Oracle, read_adapter, read_weights
from megatron_mixcpt.certify.problem import START, STUDENT, Problem
from megatron_mixcpt.certify.routes import router_names
from megatron_mixcpt.certify.scope import pressed
from megatron_mixcpt.config import Config
from megatron_mixcpt.huggingface.weights import DTYPES

# Of the error that plain torch makes, or of rounding once. In bf16 that error is large: what a smaller multiple of it
# would show is for the run in fp32 to find, which every configuration has too; but for attention on CUDA, where bf16
# alone has flash kernels.
MULTIPLE = {torch.float32: 16.0, torch.bfloat16: 3.0}
COPIES = 64.0  # of rounding once in fp32, of what ranks should have alike


@dataclass(frozen=True)
class Deviation:
    """How far one thing is off.

    Attributes:
        what: the kind of thing: samples, copies, teacher, losses, gradient, norm or weights.
        name: which of the kind.
        error: relative to the size of what was expected.
        bound: largest that is allowed.
        factor: by which what was found is best explained as a multiple of what was expected.
    """

    what: str
    name: str
    step: int
    error: float
    bound: float
    factor: float = 1.0

    @property
    def is_off(self) -> bool:
        return not self.error <= self.bound

    @property
    def share(self) -> float:
        """Of its bound that the error takes."""
        return self.error / self.bound if self.bound else (math.inf if self.error else 0.0)

    def told(self) -> str:
        """In words."""
        times = f", {self.factor:.3g} times what it should be" if abs(self.factor - 1.0) > 0.01 else ""
        return f"{self.name}, step {self.step + 1}: off by {self.error:.2g} (bound {self.bound:.1g}){times}"


class Judge:
    """Compares cases of one problem that compute the same function.

    Args:
        config: of a case, its `train.dtype` included.
    """

    def __init__(self, problem: Problem, config: Config) -> None:
        self._problem, self._config = problem, config
        self._dtype = DTYPES[config.train.dtype]
        adapter = problem.adapter(START) if config.adapter else None
        self._exact, self._plain = (
            Oracle(config, problem.model(START), adapter, dtype) for dtype in (torch.float64, self._dtype)
        )
        self._rows = Rows(problem.mix, pairs=config.kind == "dpo")
        found = read_adapter(problem.adapter(STUDENT)) if config.adapter else read_weights(problem.model(STUDENT))
        begun = {name: tensor.to(self._dtype) for name, tensor in found.items()}
        router = config.train.router
        kept = router_names(problem.arch) & begun.keys() if router == "frozen" else set[str]()
        self._student = {name: tensor for name, tensor in begun.items() if name not in kept}
        self._kept = {name: begun[name] for name in kept}  # as it is
        # Where routers have losses, these are of all tokens of a row.
        whole_rows = problem.arch.num_experts and router == "trained"
        self._filled = config.row_sequences * problem.seq_length if whole_rows else None

    def deviations(self, steps: list[Step]) -> list[Deviation]:
        """Of everything that was seen, in the order in which a training step comes to it."""
        found: list[Deviation] = []
        weights: Mapping[str, Tensor] = self._student
        for number, step in enumerate(steps):
            found += [Deviation("samples", "samples", number, float(_repeated(step)), 0.0)]
            documents = self._rows.documents(step.rows, self._filled)
            ends = {of.sample: of.begin + len(of.tokens) for of in documents}
            lengths = {sample: self._row_length(step, sample, ends) for sample in step.rows}
            choices = {sample: logits.argmax(-1) for sample, logits in step.teacher.items() if logits.shape[-1] > 2}
            factor, _ = pressed(self._config, number)
            oracles = (self._exact, self._plain)
            exact, plain = (o.step(weights, documents, lengths, choices, factor) for o in oracles)
            if number == 0:  # later the weights are the trainer's, which may be off
                self._exact.routers.check_choices(exact.scores, plain.scores)
            eps = COPIES * float(torch.finfo(torch.float32).eps)
            found += [Deviation("copies", f"copies of: {k}", number, e, eps) for k, e in step.copies.items()]
            found += self._tensors("teacher", "the teacher's logits", number, step.teacher, exact, plain)
            found += self._tensors("losses", "the losses of the tokens", number, step.losses, exact, plain)
            found += self._gradients(number, step, exact, plain)
            weights = {name: step.weights[name] for name in self._student}
        return found + self._updates(steps)

    def _row_length(self, step: Step, sample: int, ends: Mapping[int, int]) -> int:
        return ends[sample] if self._config.kind == "dpo" else len(step.losses[sample])

    def _tensors(
        self, what: str, name: str, number: int, found: Mapping[int, Tensor], exact: Expected, plain: Expected
    ) -> list[Deviation]:
        """Of all samples together."""
        right, rounded = getattr(exact, what), getattr(plain, what)
        if not right:
            return []
        if missing := right.keys() - found.keys():
            return [Deviation(what, f"{name}: missing for samples {sorted(missing)}", number, math.inf, 0.0)]
        columns = [torch.cat([of[sample].double().flatten() for sample in right]) for of in (found, right, rounded)]
        meant = ~columns[1].isnan()  # nothing is expected of padding
        values, expected, usual = (column[meant] for column in columns)
        scale = float(expected.norm()) or 1.0
        bound = self._multiple * max(float((usual - expected).norm()) / scale, self._eps)
        return [Deviation(what, name, number, _norm(values - expected) / scale, bound, _factor(values, expected))]

    def _gradients(self, number: int, step: Step, exact: Expected, plain: Expected) -> list[Deviation]:
        missing = exact.gradients.keys() ^ step.gradients.keys()
        result = [Deviation("gradient", f"gradient of {name}", number, math.inf, 0.0) for name in sorted(missing)]
        least = 1e-5 * exact.norm  # below it a tensor's gradient is as good as none
        usual = {}
        for name, right in exact.gradients.items():
            scale = max(float(right.norm()), least)
            usual[name] = float((plain.gradients[name].double() - right).norm()) / scale
        typical = statistics.median(usual.values())
        for name, right in exact.gradients.items():
            if name in step.gradients:
                values, scale = step.gradients[name].double(), max(float(right.norm()), least)
                bound = self._multiple * max(usual[name], typical, self._eps)
                error = _norm(values - right) / scale
                title = f"gradient of {name}"
                result.append(Deviation("gradient", title, number, error, bound, _factor(values, right)))
        bound = self._multiple * max(abs(plain.norm / exact.norm - 1.0), typical, self._eps)
        factors = [norm / exact.norm for norm in step.norms]
        worst = max(factors, key=lambda factor: math.inf if math.isnan(factor) else abs(factor - 1.0))
        result.append(Deviation("norm", "the gradient norm", number, abs(worst - 1.0), bound, worst))
        return result

    def _updates(self, steps: list[Step]) -> list[Deviation]:
        """What AdamW makes of the gradients that the trainer had."""
        train = self._config.train
        result: list[Deviation] = []
        ways = [
            AdamW(
                {name: tensor.to(dtype) for name, tensor in self._student.items()},
                betas=(train.adam_beta1, train.adam_beta2),
                eps=train.adam_eps,
                decay=train.weight_decay,
                clip=train.clip_grad,
            )
            for dtype in (torch.float64, torch.float32)
        ]
        for number, step in enumerate(steps):
            rate = pressed(self._config, number)[1] * learning_rate(
                number,
                peak=train.lr,
                least=train.min_lr,
                warmup=train.warmup_steps,
                steps=train.steps,
                schedule=train.schedule,
                decay_fraction=train.decay_fraction,
            )
            if step.gradients.keys() != self._student.keys():
                return result  # told already
            for way in ways:
                way.step(step.gradients, rate)
            exact, plain = ways
            usual = {}
            for name, right in exact.weights.items():
                moved = float((right - self._student[name].double()).norm()) or 1.0
                rounded = plain.weights[name].to(self._dtype).double()
                usual[name] = float((rounded - right).norm()) / moved
            typical = statistics.median(usual.values())
            for name, right in exact.weights.items():
                start = self._student[name].double()
                values, moved = step.weights[name].double(), float((right - start).norm()) or 1.0
                bound = self._multiple * max(usual[name], typical, self._eps)
                factor = _factor(values - start, right - start)
                error = _norm(values - right) / moved
                result.append(Deviation("weights", f"update of {name}", number, error, bound, factor))
            for name, before in self._kept.items():
                error = _norm(step.weights[name].double() - before.double()) / float(before.double().norm())
                result.append(Deviation("weights", f"{name}, which is not trained", number, error, 0.0))
        return result

    @property
    def _multiple(self) -> float:
        return MULTIPLE[self._dtype]

    @property
    def _eps(self) -> float:
        return float(torch.finfo(self._dtype).eps)


def _repeated(step: Step) -> int:
    """Stored sequences that the step trains on more than once."""
    seen = [(source, number) for source, of in step.rows.values() for number in of]
    return len(seen) - len(set(seen))


def _norm(difference: Tensor) -> float:
    """Infinite where a number is none."""
    value = float(difference.norm())
    return math.inf if math.isnan(value) else value


def _factor(values: Tensor, expected: Tensor) -> float:
    square = float(expected.square().sum())
    return float((values * expected).sum()) / square if square else 1.0
