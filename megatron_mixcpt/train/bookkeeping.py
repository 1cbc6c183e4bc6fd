"""From the sums of a step to what is shown and kept: console line, metrics.jsonl, tokens by source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor

from megatron_mixcpt.adapters.layout import describe_adapter
from megatron_mixcpt.architecture.throughput import peak_flops, peak_memory_gib
from megatron_mixcpt.checkpoint import Outcome, TrainingState
from megatron_mixcpt.config import Config
from megatron_mixcpt.data.position import Position
from megatron_mixcpt.errors import StoppedError
from megatron_mixcpt.model.routing import routing_metrics
from megatron_mixcpt.observe.profile import StepProfiler
from megatron_mixcpt.observe.record import Record
from megatron_mixcpt.runtime.parallel import ParallelState
from megatron_mixcpt.runtime.timing import StepTimer
from megatron_mixcpt.train.agreement import StepTotals
from megatron_mixcpt.train.forgetting import Forgetting
from megatron_mixcpt.train.guard import StepGuard
from megatron_mixcpt.train.schedule import learning_rate
from megatron_mixcpt.train.setup import Components
from megatron_mixcpt.units import duration

SHORTEST_STEP = 1e-9  # seconds; guards a division


class Bookkeeping:
    """Bookkeeping of a run. All ranks keep the counters; rank 0 alone prints and writes.

    Args:
        position: how much of the data has been drawn.
        guard: which steps are skipped.
        forgetting: the run's budget.
        step: steps done.
        saved: what the checkpoint that is resumed says, if any.
    """

    def __init__(
        self,
        config: Config,
        state: ParallelState,
        components: Components,
        position: Position,
        guard: StepGuard,
        forgetting: Forgetting,
        step: int,
        saved: TrainingState | None,
    ) -> None:
        self.config, self.state, self.components, self.position, self.guard = config, state, components, position, guard
        self.forgetting = forgetting
        self._step, self._validated_step = step, -1
        self.sources = [source.name for source in components.mix.train_sources]
        self.tokens = dict.fromkeys(self.sources, 0) | (saved.tokens_by_source if saved else {})
        self.stream = saved.sample_stream if saved else ""
        """Chained hash of all samples so far: equal streams mean that none was lost, repeated or swapped."""
        self._tokens_column = components.task.objective.statistics.index("tokens")
        self._peak = peak_flops(state.device, config.train.dtype)
        self._before = dict(saved.validation_before or {}) if saved else {}
        self._timer = StepTimer(state.device)
        self._profiler = StepProfiler(
            config.train.profile,
            Path(config.run_dir) / "profile",
            state.rank,
            traces=state.data_rank == state.tensor_rank == state.context_rank == 0,
            timer=self._timer,
        )
        self._record: Record | None = None
        if state.rank == 0:
            self._record = Record(config, step, saved.wandb_id if saved else None)
            self._introduce(step)
            if 0 < step < config.train.steps:
                self._record.write(step, {"train/tokens": sum(self.tokens.values()), "run/resumed": 1})

    def __enter__(self) -> Bookkeeping:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._timer.remove()
        self._tell(self._profiler.close())
        if self._record is not None:
            stopped = isinstance(error, StoppedError)
            self._record.close("finished" if error is None else "stopped" if stopped else "failed")

    def start_clock(self) -> None:
        """From now on every moment counts to a row; what was before is no step's."""
        self._timer.lap()
        self._timer.install()

    def begin_step(self, step: int) -> None:
        """`step` counts from 1."""
        self._profiler.begin(step)

    def stepped(self, step: int, totals: StepTotals, grad_norm: float) -> None:
        """Account for a finished step."""
        self._step = step
        for name, row in zip(self.sources, totals.rows):
            self.tokens[name] += int(row[self._tokens_column])
        self.stream = xxhash.xxh3_64_hexdigest(f"{self.stream} {totals.digest:016x}".encode())
        self._tell(self._profiler.end(step))
        times = self._timer.lap()
        rate = self.forgetting.rate_factor * learning_rate(step - 1, self.config.train)  # before it decides anew
        budget, said = self.forgetting.stepped(totals, taken=not self.guard.reason)
        if self._record is not None:
            self._record.step(step, self._metrics(totals, grad_norm, times) | {"optim/lr": rate} | budget)
            self._tell(said and f"step {step}: {said}")
            if self.guard.reason:
                self.message(f"step {step}: skipped, its {self.guard.reason}")

    def validated(
        self, step: int, metrics: dict[str, float], items: dict[str, Tensor], *, whole: bool, saves: bool
    ) -> None:
        """`items`: see `validate`; `whole`: no stop cut it short; `saves`: a checkpoint of this step is due."""
        budget: dict[str, Any] = {}
        said = ""
        if whole:
            self._validated_step = step
            budget, said = self.forgetting.measured(step, items, saves=saves)
        losses = {name.split("/")[1]: metrics[f"{name[:-3]}loss"] for name in metrics if name.endswith("/ppl")}
        if step == 0:
            self._before |= losses
        forgotten = {
            f"forget/{name}/delta": loss - self._before[name] for name, loss in losses.items() if name in self._before
        }
        if self._record is not None and metrics:
            self._write(step, metrics | forgotten | budget)
            measured = [
                f"{name.split('/', 1)[1].replace('/', ' ')} {value:.2f}"
                for name, value in metrics.items()
                if name.endswith(("/ppl", "/accuracy"))
            ]
            self.message(f"step {step}: validation | " + " | ".join(measured))
            self._tell(said and f"step {step}: {said}")

    def saved(self, outcome: Outcome) -> None:
        if outcome.path is None:
            self.forgetting.unsaved(outcome.step)
        if self._record is None:
            return
        if outcome.path is None:
            self._write(outcome.step, {"ckpt/failed": 1})
            self.message(
                f"warning: the checkpoint of step {outcome.step} was not saved, training goes on with the one before: "
                f"{outcome.error}"
            )
            return
        self._write(outcome.step, {"ckpt/seconds": outcome.seconds, "ckpt/blocked_seconds": outcome.blocked})
        self.message(f"step {outcome.step}: saved {outcome.path} in {duration(outcome.seconds)}")

    def concluded(self, text: str) -> None:
        """Tell and keep what became of a forgetting budget."""
        if self._record is not None:
            self._write(self._step, {"forget/decision": text})
        self.message(text)

    def message(self, text: str) -> None:
        if self._record is not None:
            self._record.console.message(text)

    def training_state(self) -> TrainingState:
        """What a later run, export or report needs to know."""
        config, mix = self.config, self.components.mix
        return TrainingState(
            config_hash=xxhash.xxh3_128_hexdigest(config.model_dump_json(by_alias=True).encode()),
            data_fingerprint=mix.fingerprint,
            tokenizer_hash=mix.tokenizer_hash,
            seq_length=mix.seq_length,
            data=self.position.state(),
            validated=self._validated_step == self._step,
            tokens_by_source=dict(self.tokens),  # written when the next step may have counted its own
            sample_stream=self.stream,
            validation_before=self._before,
            wandb_id=self._record.wandb_id if self._record else None,
            guard=self.guard.state(),
            forget=self.forgetting.state(),
            start=self.components.start,
            dtype=config.train.dtype,
            kind=config.kind,
            steps=config.train.steps,
            router=config.train.router if self.components.arch.num_experts else None,
            global_batch_size=config.train.global_batch_size,
            layout={"world_size": self.state.world_size, **config.parallel.model_dump()},
        )

    def _tell(self, text: str | None) -> None:
        if text:
            self.message(text)

    def _write(self, step: int, metrics: dict[str, Any]) -> None:
        """A row beside those of the steps."""
        assert self._record is not None
        self._record.write(step, {"train/tokens": sum(self.tokens.values()), **metrics, **self._timer.lap()})

    def _metrics(self, totals: StepTotals, grad_norm: float, times: dict[str, float]) -> dict[str, Any]:
        rows = totals.rows
        total = [sum(column) for column in zip(*rows)]
        all_tokens = sum(self.tokens.values())
        processed = self.config.train.global_batch_size * self.components.task.row_length
        seconds = max(sum(times.values()) - times.get("time/checkpoint", 0.0), SHORTEST_STEP)
        rate = processed / seconds / self.state.world_size
        metrics: dict[str, Any] = {
            "train/tokens": all_tokens,
            "train/loss": totals.loss,
        }
        own = self.components.task.metrics(total, dict(zip(self.sources, rows)))
        metrics |= own
        metrics |= routing_metrics(totals.routed, self.components.arch)
        for name in self.sources:
            metrics[f"mix/tokens/{name}"] = self.tokens[name]
            metrics[f"mix/share/{name}"] = self.tokens[name] / max(all_tokens, 1)
        metrics |= {
            "optim/grad_norm": grad_norm,
            "optim/skipped": self.guard.skipped,
            "data/stream": self.stream,
            "speed/tok_per_s_gpu": rate,
            "speed/step_seconds": seconds,
            "speed/data_pct": 100.0 * times.get("time/data", 0.0) / seconds,
            "mem/peak_gib": peak_memory_gib(self.state.device),
            **times,
        }
        flops = self.components.task.flops_per_token
        if self._peak is not None and flops is not None:
            metrics["speed/mfu"] = rate * flops / self._peak
        return metrics

    def _introduce(self, step: int) -> None:
        """Every derived number, once, at the start."""
        config, state, mix, arch = self.config, self.state, self.components.mix, self.components.arch
        batch_tokens = config.train.global_batch_size * self.components.task.row_length
        shares = ", ".join(f"{source.name} {source.weight:.0%}" for source in mix.train_sources)
        lines = [
            f"model   {config.model.source}: {arch.describe_parameters()}, {config.train.dtype}",
            f"grid    tensor {state.tensor_size} x pipeline {state.pipeline_size} "
            + f"x context {state.context_size} " * (state.context_size > 1)
            + f"x data {state.data_size} "
            + f"with experts over {state.expert_size} of them " * (state.expert_size > 1)
            + f"on {state.device.type}"
            + (", sequence parallel" if config.parallel.sequence else ""),
            f"data    {mix.path}: {shares}",
            f"batch   {config.train.global_batch_size} x {self.components.task.row_length} = {batch_tokens} tokens; "
            f"{config.train.steps} steps = {batch_tokens * config.train.steps / 1e6:.2f} M tokens",
            f"loss    {self.components.task.describe()}",
        ]
        if config.adapter is not None:
            lines.insert(1, f"adapter {describe_adapter(arch, config.adapter)}")
            if config.uses_teacher and config.teacher.source == "initial":
                lines.append(
                    "note    teacher.source=adapter_off is this model without its adapters, at no extra memory"
                )
        if step:
            lines.append(f"resume  at step {step} of {config.train.steps}")
        for line in lines:
            self.message(line)
