"""From the sums of a step to what is shown and kept: console line, metrics.jsonl, tokens by source."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from megatron_mixcpt.config import Config
from megatron_mixcpt.losses.mixcpt import STATISTICS
from megatron_mixcpt.observe.console import TrainConsole, duration
from megatron_mixcpt.observe.metrics import MetricsFile
from megatron_mixcpt.observe.throughput import flops_per_token, peak_flops, peak_memory_gib
from megatron_mixcpt.parallel import ParallelState
from megatron_mixcpt.train.schedule import learning_rate
from megatron_mixcpt.train.setup import Parts

TOKENS, LOSS, CE, KD, SWAPPED = range(len(STATISTICS))


class Progress:
    """Bookkeeping of a run. All ranks keep the counters; rank 0 alone prints and writes.

    Args:
        step: steps already done by earlier runs.
        tokens_by_source: target tokens trained on by them.
    """

    def __init__(
        self, config: Config, state: ParallelState, parts: Parts, step: int, tokens_by_source: dict[str, int]
    ) -> None:
        self.config, self.state, self.parts = config, state, parts
        self.sources = [source.name for source in parts.mix.train_sources]
        self.tokens = {name: tokens_by_source.get(name, 0) for name in self.sources}
        self.skipped = 0
        self._flops = flops_per_token(parts.arch, parts.mix.seq_length, with_teacher=config.uses_teacher)
        self._peak = peak_flops(state.device)
        self._console: TrainConsole | None = None
        if state.rank == 0:
            self._file = MetricsFile(Path(config.run_dir) / "metrics.jsonl", step)
            self._console = TrainConsole(config.train.steps, step)
            self._introduce(step)

    def stepped(
        self,
        step: int,
        totals: torch.Tensor,
        grad_norm: float,
        data_seconds: float,
        seconds: float,
        stop_signal: int | None,
    ) -> bool:
        """Collective: account for a finished step; True where any rank was asked to stop.

        `totals`: this rank's `[num_sources, len(STATISTICS)]` sums. The stop flag travels in the same all-reduce.
        """
        flag = torch.tensor([float(stop_signal is not None)], dtype=totals.dtype, device=totals.device)
        message = torch.cat([totals.flatten(), flag])
        torch.distributed.all_reduce(message)
        rows = message[:-1].view_as(totals).tolist()
        for name, row in zip(self.sources, rows):
            self.tokens[name] += int(row[TOKENS])
        self.skipped += not math.isfinite(grad_norm)
        if self._console is not None:
            metrics = self._metrics(step, rows, grad_norm, data_seconds, seconds)
            self._file.write(step, metrics)
            self._console.step(step, metrics)
        return message[-1].item() > 0

    def validated(self, step: int, metrics: dict[str, float]) -> None:
        if self._console is not None and metrics:
            self._file.write(step, metrics)
            parts = [
                f"{name.split('/', 1)[1].removesuffix('/ppl')} {value:.2f}"
                for name, value in metrics.items()
                if name.endswith("/ppl")
            ]
            self._console.message(f"step {step}: validation perplexity | " + " | ".join(parts))

    def saved(self, step: int, path: Path, seconds: float) -> None:
        if self._console is not None:
            self._file.write(step, {"ckpt/seconds": seconds})
            self._console.message(f"step {step}: saved {path} in {duration(seconds)}")

    def checkpoint_info(self) -> dict[str, Any]:
        """What a later run, export or report needs to know, for `checkpoint.json`."""
        return {
            "data_fingerprint": self.parts.mix.fingerprint,
            "tokenizer_hash": self.parts.mix.tokenizer_hash,
            "tokens_by_source": self.tokens,
            "dtype": self.config.train.dtype,
            "global_batch_size": self.config.train.global_batch_size,
            "layout": {"world_size": self.state.world_size, **self.config.parallel.model_dump()},
        }

    def close(self) -> None:
        if self._console is not None:
            self._console.close()
            self._file.close()

    def _metrics(
        self, step: int, rows: list[list[float]], grad_norm: float, data_seconds: float, seconds: float
    ) -> dict[str, Any]:
        total = [sum(column) for column in zip(*rows)]
        targets = max(total[TOKENS], 1.0)
        all_tokens = sum(self.tokens.values())
        processed = self.config.train.global_batch_size * self.parts.mix.seq_length
        rate = processed / seconds / self.state.world_size
        metrics: dict[str, Any] = {
            "train/tokens": all_tokens,
            "train/loss": total[LOSS] / targets,
            "train/ce": total[CE] / targets,
        }
        if self.config.uses_teacher:
            metrics["train/kd"] = total[KD] / targets
            metrics["train/swap_rate"] = total[SWAPPED] / targets
        for name, row in zip(self.sources, rows):
            if row[TOKENS] > 0:
                metrics[f"train/ce/{name}"] = row[CE] / row[TOKENS]
            metrics[f"mix/tokens/{name}"] = self.tokens[name]
            metrics[f"mix/share/{name}"] = self.tokens[name] / max(all_tokens, 1)
        metrics |= {
            "optim/lr": learning_rate(step - 1, self.config.train),
            "optim/grad_norm": grad_norm if math.isfinite(grad_norm) else None,  # JSON has no NaN
            "optim/skipped": self.skipped,
            "speed/tok_per_s_gpu": rate,
            "speed/step_seconds": seconds,
            "speed/data_pct": 100.0 * data_seconds / seconds,
            "mem/peak_gib": peak_memory_gib(self.state.device),
        }
        if self._peak is not None:
            metrics["speed/mfu"] = rate * self._flops / self._peak
        return metrics

    def _introduce(self, step: int) -> None:
        """Every derived number, once, at the start."""
        assert self._console is not None
        config, state, mix, arch = self.config, self.state, self.parts.mix, self.parts.arch
        batch_tokens = config.train.global_batch_size * mix.seq_length
        shares = ", ".join(f"{source.name} {source.weight:.0%}" for source in mix.train_sources)
        loss = config.loss
        lines = [
            f"model   {config.model.hf or config.model.preset}: {arch.num_parameters / 1e6:.1f} M parameters, "
            f"{config.train.dtype}",
            f"grid    tensor {state.tensor_size} x pipeline {state.pipeline_size} x data {state.data_size} "
            f"on {state.device.type}" + (", sequence parallel" if config.parallel.sequence else ""),
            f"data    {mix.path}: {shares}",
            f"batch   {config.train.global_batch_size} x {mix.seq_length} = {batch_tokens} tokens; "
            f"{config.train.steps} steps = {batch_tokens * config.train.steps / 1e6:.2f} M tokens",
            f"loss    {loss.ce_weight:g} CE"
            + (f" + {loss.kd_weight:g} KL({loss.target} teacher)" if config.uses_teacher else ""),
        ]
        if step:
            lines.append(f"resume  at step {step} of {config.train.steps}")
        for line in lines:
            self._console.message(line)
