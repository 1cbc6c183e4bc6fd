"""Any vocabulary-parallel loss under the oracle: value and gradient on 1, 2 and 4 ranks.

    python -m megatron_mixcpt.certify.foreign FOLDER        (in each rank, under a launcher)

A loss is called with this rank's columns of the logits, and returns the loss of each token or one number:

    cross-entropy     function(logits [t, v/n], labels [t], group)
    forward-kl        function(student [t, v/n], teacher [t, v/n], group)       KL(teacher || student)
    reverse-kl        the same                                                  KL(student || teacher)

Tokens that the group's ranks share are the same on all of them, as under tensor parallelism, and so is the upstream
gradient. A loss that scales or masks on its own is to be wrapped in a function of this form.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mixcpt.certify.formulas import cross_entropy, divergence
from megatron_mixcpt.errors import ConfigError, MixcptError
from megatron_mixcpt.runtime.devices import cuda_devices, take_device
from megatron_mixcpt.runtime.failures import LOST_PEER
from megatron_mixcpt.runtime.launcher import launch, ranks_of_our_own
from megatron_mixcpt.runtime.stop import end_at_stop_signals

FORMULAS = ("cross-entropy", "forward-kl", "reverse-kl")
RANKS = (1, 2, 4)
TOKENS, VOCABULARY, SCALE = 24, 96, 3.0
MULTIPLE = 32.0  # of the error that plain torch makes in fp32
TASK = "loss.json"
CPU = torch.device("cpu")
TIMEOUT = timedelta(minutes=2)

Loss = Callable[[Tensor, Tensor, "dist.ProcessGroup"], Tensor]


@dataclass(frozen=True)
class Verdict:
    """On so many ranks.

    Attributes:
        value, gradient: error relative to the size of what is right.
        bounds: of the two.
        factor: by which the gradient is best explained as a multiple of the right one.
        failed: what the loss raised, if it did.
    """

    ranks: int
    value: float
    gradient: float
    bounds: tuple[float, float]
    factor: float
    failed: str | None = None

    @property
    def is_off(self) -> bool:
        within = self.value <= self.bounds[0] and self.gradient <= self.bounds[1]
        return self.failed is not None or not within

    def told(self) -> str:
        """In words."""
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        if self.failed is not None:
            return f"{ranks}: {self.failed}"
        words = [
            f"{what} {'off by' if not error <= bound else 'within'} {error:.2g}"
            for what, error, bound in zip(("value", "gradient"), (self.value, self.gradient), self.bounds)
        ]
        if self.gradient > self.bounds[1] and abs(self.factor - 1.0) > 0.01:
            words.append(f"best explained as {self.factor:.3g} times the right gradient")
            words += ["the group's size"] * (abs(self.factor - self.ranks) < 0.01)
        return f"{ranks}: {', '.join(words)}"


def certify_loss(name: str, formula: str, nproc: int, device: str) -> list[Verdict]:
    """Hold the loss `name` (package.module:function) against `formula`, on the numbers of RANKS up to `nproc`.

    Raises ConfigError where there is no such function, or no rank to try it on.
    """
    if nproc < 1:
        raise ConfigError(f"--nproc {nproc}: give the most ranks to try, from 1")
    if device == "cuda" and (count := cuda_devices()) < nproc:
        raise ConfigError(
            f"--device cuda: this machine has {count} devices for {nproc} ranks: give --nproc, or --device cpu"
        )
    load(name)
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="mixcpt-loss-") as folder:
        for ranks in [count for count in RANKS if count <= nproc]:
            (Path(folder) / TASK).write_text(json.dumps({"name": name, "formula": formula}))
            with ranks_of_our_own(device):
                code = launch(ranks, [folder], program="megatron_mixcpt.certify.foreign")
            if code == 128 + signal.SIGINT:
                raise KeyboardInterrupt
            if code != 0:
                raise MixcptError(f"certify-loss: {name} ended with exit code {code} on {ranks} ranks: see above")
            found = [torch.load(Path(folder) / f"{ranks}-{rank}.pt", weights_only=True) for rank in range(ranks)]
            verdicts.append(judge(formula, found))
    return verdicts


def load(name: str) -> Loss:
    """The function `package.module:function`. Raises ConfigError."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a module of others may raise while it is imported
        raise ConfigError(f"{name}: {type(error).__name__}: {error}; a loss is named package.module:function") from None
    finally:
        sys.path.remove(os.getcwd())


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher logits `[t, v]`, labels `[t]` in every rank's part, and the upstream gradient `[t]`, fp32."""
    generator = torch.Generator().manual_seed(7)
    student, teacher = SCALE * torch.randn(2, TOKENS, VOCABULARY, generator=generator)
    labels = torch.linspace(0, VOCABULARY - 1, TOKENS).long()
    return student, teacher, labels, 0.5 + torch.rand(TOKENS, generator=generator)


def textbook(formula: str, dtype: torch.dtype, *, reduced: bool) -> tuple[Tensor, Tensor]:
    """(value, gradient in the student) of the dense formula; `reduced`: of the mean, else by token."""
    student, teacher, labels, upstream = (x if x.dtype == torch.int64 else x.to(dtype) for x in problem())
    student.requires_grad_()
    if formula == "cross-entropy":
        loss = cross_entropy(student, labels)
    else:
        pair = torch.log_softmax(teacher, -1), torch.log_softmax(student, -1)
        loss = divergence(*(pair if formula == "forward-kl" else pair[::-1]))
    loss = loss.mean() if reduced else loss
    (gradient,) = torch.autograd.grad(loss, student, torch.ones_like(loss) if reduced else upstream)
    return loss.detach(), gradient


def judge(formula: str, found: list[dict]) -> Verdict:
    """`found`: what each rank wrote."""
    ranks = len(found)
    failures = [result["failed"] for result in found if "failed" in result]
    if failures:
        # Where one rank fails the others lose it, and say that alone.
        cause = next((failure for failure in failures if not LOST_PEER.search(failure)), failures[0])
        return Verdict(ranks, 0.0, 0.0, (0.0, 0.0), 1.0, cause)
    reduced = found[0]["value"].dim() == 0
    value, gradient = textbook(formula, torch.float64, reduced=reduced)
    plain_value, plain_gradient = textbook(formula, torch.float32, reduced=reduced)
    eps = float(torch.finfo(torch.float32).eps)
    bounds = [
        MULTIPLE * max(_apart(plain, right), eps) for plain, right in ((plain_value, value), (plain_gradient, gradient))
    ]
    whole = torch.cat([result["gradient"] for result in found], -1)
    wrong = max(_apart(result["value"], value) for result in found)
    factor = float((whole * gradient).sum() / gradient.square().sum())
    return Verdict(ranks, wrong, _apart(whole, gradient), (bounds[0], bounds[1]), factor)


def _apart(found: Tensor, right: Tensor) -> float:
    if found.shape != right.shape:
        return float("inf")
    error = float((found.double() - right).norm() / right.norm())
    return error if error == error else float("inf")


def called(name: str, formula: str, group: dist.ProcessGroup, device: torch.device = CPU) -> dict[str, Tensor | str]:
    """Value and gradient of the loss on this rank's columns, or what it raised (`failed`). Collective."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    student, teacher, labels, upstream = (x.to(device) for x in problem())
    mine = slice(rank * VOCABULARY // ranks, (rank + 1) * VOCABULARY // ranks)
    logits = student[:, mine].clone().requires_grad_()
    try:
        loss = load(name)(logits, labels if formula == "cross-entropy" else teacher[:, mine].clone(), group)
        loss.backward(torch.ones_like(loss) if loss.dim() == 0 else upstream.to(loss.dtype))
    except Exception as error:  # whatever a loss of others may raise
        return {"failed": f"{type(error).__name__}: {error}"}
    gradient = torch.zeros_like(logits) if logits.grad is None else logits.grad
    return {"value": loss.detach().cpu(), "gradient": gradient.cpu()}


def main(folder: Path) -> None:
    """One rank: call the loss on its part, and write value and gradient."""
    end_at_stop_signals()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    task = json.loads((folder / TASK).read_text())
    device = take_device(rank)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    assert dist.group.WORLD is not None
    result = called(task["name"], task["formula"], dist.group.WORLD, device)
    torch.save(result, folder / f"{ranks}-{rank}.pt")
    sys.stdout.flush()
    os._exit(0)  # a group whose peer has failed can hang while it is taken down


if __name__ == "__main__":
    main(Path(sys.argv[1]))
