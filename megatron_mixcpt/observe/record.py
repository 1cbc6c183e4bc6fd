"""What rank 0 shows and keeps of a run: console, metrics.jsonl, wandb, and at the end the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mixcpt.config import Config
from megatron_mixcpt.observe.console import TrainConsole
from megatron_mixcpt.observe.metrics import MetricsFile, finite
from megatron_mixcpt.observe.run_report import REPORT, write_report
from megatron_mixcpt.observe.wandb_process import Ending, WandbProcess, choose_mode, run_id_of


class Record:
    """One run's outputs.

    Args:
        step: steps done so far.
        wandb_id: of the checkpoint that is resumed.
    """

    def __init__(self, config: Config, step: int, wandb_id: str | None) -> None:
        self._run_dir = run_dir = Path(config.run_dir)
        self._file = MetricsFile(run_dir / "metrics.jsonl", step)
        self.console = TrainConsole(config.train.steps, step)
        self.wandb_id = wandb_id
        self._wandb: WandbProcess | None = None
        mode = choose_mode(config.wandb)
        if mode != "disabled":
            self.wandb_id = run_id_of(run_dir, wandb_id)
            self._wandb = WandbProcess(
                config.wandb,
                run_dir,
                mode=mode,
                run_id=self.wandb_id,
                values=config.model_dump(by_alias=True),
                # The watchdog must not take the wait for a hang.
                timeout=min(config.wandb.timeout_seconds, 30.0 * config.train.timeout_minutes),
            )

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Keep a row."""
        self._file.write(step, finite(metrics))

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Keep and show the row of a step."""
        kept = finite(metrics)
        self._file.write(step, kept)
        self.console.step(step, kept)

    def close(self, ending: Ending) -> None:
        """Write the report and let wandb finish."""
        self.console.close()
        self._file.close()
        try:
            write_report([self._run_dir], self._run_dir / REPORT)
        except Exception as error:  # a page about the run must not fail the run
            self.console.message(f"warning: no report: {type(error).__name__}: {error}")
        if self._wandb is not None:
            self.console.message(self._wandb.close(ending))
