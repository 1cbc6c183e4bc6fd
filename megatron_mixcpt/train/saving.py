"""When a run saves, and what becomes of a save that failed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from time import monotonic

from megatron_mixcpt.checkpoint import Outcome, Saver
from megatron_mixcpt.config import Config
from megatron_mixcpt.convert.export import write_adapter_of
from megatron_mixcpt.errors import MixcptError
from megatron_mixcpt.runtime.timing import section
from megatron_mixcpt.train.bookkeeping import Bookkeeping
from megatron_mixcpt.train.forgetting import Forgetting
from megatron_mixcpt.train.setup import Components


class RunSaver:
    """Saves the run's state. A save that fails is told, and training goes on; only the last one must succeed.

    All methods are collective.

    Args:
        step: that the run begins at.
    """

    def __init__(
        self,
        config: Config,
        components: Components,
        bookkeeping: Bookkeeping,
        forgetting: Forgetting,
        step: int,
    ) -> None:
        self._components, self._bookkeeping, self._forgetting = components, bookkeeping, forgetting
        self._longest = 60.0 * config.checkpoint.every_minutes
        self._saved_step, self._saved_at = step, monotonic()
        self._saver = Saver(
            Path(config.run_dir) / "checkpoints",
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            background=config.checkpoint.background,
            add_files=partial(write_adapter_of, arch=components.arch, config=config.adapter)
            if config.adapter
            else _nothing,
        )

    @section("checkpoint")
    def save(self, step: int, *, last: bool) -> None:
        """Save; in the background, unless it is the `last` of this run. Raises MixcptError where that one fails."""
        self._finish()
        components = self._components
        self._saved_step, self._saved_at = step, monotonic()
        self._saver.spared = self._forgetting.best_step
        self._saver.begin(step, components.model, components.optimizer, self._bookkeeping.training_state())
        if last or not self._saver.background:
            self._finish(last=last)

    @property
    def is_late(self) -> bool:
        """Whether the last checkpoint is older than `checkpoint.every_minutes`, by this rank's clock."""
        return 0.0 < self._longest < monotonic() - self._saved_at

    def answer(self, step: int) -> str:
        """What whoever asks to stop is told while the step after `step` is being taken."""
        lost = step - self._saved_step
        cost = f"loses {lost} step{'s' * (lost != 1)} since the last checkpoint" if lost else "loses this step"
        return f"finishing step {step + 1}, then saving; ^C again stops now and {cost}"

    @section("checkpoint")
    def poll(self) -> None:
        """After each step: complete a save that all ranks have written."""
        self._settle(self._saver.poll())

    def _finish(self, *, last: bool = False) -> None:
        self._settle(self._saver.finish(), last=last)

    def _settle(self, outcome: Outcome | None, *, last: bool = False) -> None:
        if outcome is None:
            return
        if last and outcome.path is None:
            raise MixcptError(
                f"the checkpoint of step {outcome.step} was not saved ({outcome.error}); what was saved before is "
                "intact: make room and run the same command again"
            )
        self._bookkeeping.saved(outcome)


def _nothing(folder: Path) -> None:
    pass
