"""From the sums of a step to what is shown and kept: console line, metrics.jsonl, tokens by source."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import xxhash

from megatron_mixcpt.checkpoint import Outcome
from megatron_mixcpt.config import Config
from megatron_mixcpt.data.position import Position
from megatron_mixcpt.observe.console import TrainConsole, duration
from megatron_mixcpt.observe.metrics import MetricsFile
from megatron_mixcpt.observe.throughput import peak_flops, peak_memory_gib
from megatron_mixcpt.parallel import ParallelState
from megatron_mixcpt.train.agreement import StepTotals
from megatron_mixcpt.train.guard import StepGuard
from megatron_mixcpt.train.schedule import learning_rate
from megatron_mixcpt.train.setup import Parts


class Progress:
    """Bookkeeping of a run. All ranks keep the counters; rank 0 alone prints and writes.

    Args:
        position: how much of the data has been drawn.
        guard: which steps are skipped.
        saved: `checkpoint.json` of the checkpoint that is resumed, if any.
    """

    def __init__(
        self,
        config: Config,
        state: ParallelState,
        parts: Parts,
        position: Position,
        guard: StepGuard,
        saved: dict[str, Any] | None,
    ) -> None:
        self.config, self.state, self.parts, self.position, self.guard = config, state, parts, position, guard
        saved = saved or {"step": 0, "tokens_by_source": {}, "sample_stream": ""}
        step = saved["step"]
        self._step, self._validated_step = step, -1
        self.sources = [source.name for source in parts.mix.train_sources]
        self.tokens = dict.fromkeys(self.sources, 0) | saved["tokens_by_source"]
        self.stream: str = saved["sample_stream"]
        """Chained hash of all samples so far: equal streams mean that none was lost, repeated or swapped."""
        self._tokens_column = parts.task.objective.statistics.index("tokens")
        self._peak = peak_flops(state.device)
        self._console: TrainConsole | None = None
        if state.rank == 0:
            self._file = MetricsFile(Path(config.run_dir) / "metrics.jsonl", step)
            self._console = TrainConsole(config.train.steps, step)
            self._introduce(step)

    def stepped(self, step: int, totals: StepTotals, grad_norm: float, data_seconds: float, seconds: float) -> None:
        """Account for a finished step."""
        self._step = step
        for name, row in zip(self.sources, totals.rows):
            self.tokens[name] += int(row[self._tokens_column])
        self.stream = xxhash.xxh3_64_hexdigest(f"{self.stream} {totals.digest:016x}".encode())
        if self._console is not None:
            metrics = self._metrics(step, totals, grad_norm, data_seconds, seconds)
            self._file.write(step, metrics)
            self._console.step(step, metrics)
            if self.guard.reason:
                self._console.message(f"step {step}: skipped, its {self.guard.reason}")

    def validated(self, step: int, metrics: dict[str, float], *, whole: bool) -> None:
        """`whole`: no stop cut it short."""
        if whole:
            self._validated_step = step
        if self._console is not None and metrics:
            self._file.write(step, metrics)
            parts = [
                f"{name.split('/', 1)[1].replace('/', ' ')} {value:.2f}"
                for name, value in metrics.items()
                if name.endswith(("/ppl", "/accuracy"))
            ]
            self._console.message(f"step {step}: validation | " + " | ".join(parts))

    def saved(self, outcome: Outcome) -> None:
        if self._console is None:
            return
        if outcome.path is None:
            self._file.write(outcome.step, {"ckpt/failed": 1})
            self._console.message(
                f"warning: the checkpoint of step {outcome.step} was not saved, training goes on with the one before: "
                f"{outcome.error}"
            )
            return
        self._file.write(outcome.step, {"ckpt/seconds": outcome.seconds, "ckpt/blocked_seconds": outcome.blocked})
        self._console.message(f"step {outcome.step}: saved {outcome.path} in {duration(outcome.seconds)}")

    def message(self, text: str) -> None:
        if self._console is not None:
            self._console.message(text)

    def checkpoint_info(self) -> dict[str, Any]:
        """What a later run, export or report needs to know, for `checkpoint.json`."""
        config = self.config
        return {
            "config_hash": xxhash.xxh3_128_hexdigest(config.model_dump_json(by_alias=True).encode()),
            "data_fingerprint": self.parts.mix.fingerprint,
            "tokenizer_hash": self.parts.mix.tokenizer_hash,
            "seq_length": self.parts.mix.seq_length,
            "data": self.position.state(),
            "validated": self._validated_step == self._step,
            "tokens_by_source": self.tokens,
            "sample_stream": self.stream,
            "guard": self.guard.state(),
            "start": self.parts.start,
            "dtype": config.train.dtype,
            "global_batch_size": config.train.global_batch_size,
            "layout": {"world_size": self.state.world_size, **config.parallel.model_dump()},
        }

    def close(self) -> None:
        if self._console is not None:
            self._console.close()
            self._file.close()

    def _metrics(
        self, step: int, totals: StepTotals, grad_norm: float, data_seconds: float, seconds: float
    ) -> dict[str, Any]:
        rows = totals.rows
        total = [sum(column) for column in zip(*rows)]
        all_tokens = sum(self.tokens.values())
        processed = self.config.train.global_batch_size * self.parts.task.row_length
        rate = processed / seconds / self.state.world_size
        metrics: dict[str, Any] = {
            "train/tokens": all_tokens,
            "train/loss": _finite(totals.loss),
        }
        own = self.parts.task.objective.metrics(total, dict(zip(self.sources, rows)))
        metrics |= {name: _finite(value) for name, value in own.items()}
        for name in self.sources:
            metrics[f"mix/tokens/{name}"] = self.tokens[name]
            metrics[f"mix/share/{name}"] = self.tokens[name] / max(all_tokens, 1)
        metrics |= {
            "optim/lr": learning_rate(step - 1, self.config.train),
            "optim/grad_norm": _finite(grad_norm),
            "optim/skipped": self.guard.skipped,
            "data/stream": self.stream,
            "speed/tok_per_s_gpu": rate,
            "speed/step_seconds": seconds,
            "speed/data_pct": 100.0 * data_seconds / seconds,
            "mem/peak_gib": peak_memory_gib(self.state.device),
        }
        if self._peak is not None:
            metrics["speed/mfu"] = rate * self.parts.task.flops_per_token / self._peak
        return metrics

    def _introduce(self, step: int) -> None:
        """Every derived number, once, at the start."""
        assert self._console is not None
        config, state, mix, arch = self.config, self.state, self.parts.mix, self.parts.arch
        batch_tokens = config.train.global_batch_size * self.parts.task.row_length
        shares = ", ".join(f"{source.name} {source.weight:.0%}" for source in mix.train_sources)
        lines = [
            f"model   {config.model.source}: {arch.num_parameters / 1e6:.1f} M parameters, {config.train.dtype}",
            f"grid    tensor {state.tensor_size} x pipeline {state.pipeline_size} x data {state.data_size} "
            f"on {state.device.type}" + (", sequence parallel" if config.parallel.sequence else ""),
            f"data    {mix.path}: {shares}",
            f"batch   {config.train.global_batch_size} x {self.parts.task.row_length} = {batch_tokens} tokens; "
            f"{config.train.steps} steps = {batch_tokens * config.train.steps / 1e6:.2f} M tokens",
            f"loss    {self.parts.task.objective.describe()}",
        ]
        if step:
            lines.append(f"resume  at step {step} of {config.train.steps}")
        for line in lines:
            self._console.message(line)


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
