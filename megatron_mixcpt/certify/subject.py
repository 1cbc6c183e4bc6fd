"""One rank of the trainer itself on the small problem: what it computes in two steps, written as it is.

A folder holds `cases.json`, a list of cases; each rank writes `CASE/rank_N.pt` there. Tensors are shards, as the rank
has them: observed.py puts them together.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_mixcpt.adapters.files import read_directory
from megatron_mixcpt.certify.problem import STEPS
from megatron_mixcpt.certify.scope import pressed
from megatron_mixcpt.config import AdapterConfig, Config, validate
from megatron_mixcpt.data.batch import Batch, train_batches
from megatron_mixcpt.data.position import Position
from megatron_mixcpt.model.gpt import MixGPTModel
from megatron_mixcpt.model.interleaved import StageModel
from megatron_mixcpt.model.load import load_hf
from megatron_mixcpt.objectives.mixcpt import MixCPTLoss
from megatron_mixcpt.objectives.pairs import PairBatch, PairRows
from megatron_mixcpt.objectives.task import Objective
from megatron_mixcpt.runtime.parallel import ParallelState, parallel_context
from megatron_mixcpt.runtime.stop import StopRequest
from megatron_mixcpt.teacher.interface import DenseTarget, HiddenTarget, Target, Teacher, TopkTarget
from megatron_mixcpt.train.cache_teacher import cache_teacher
from megatron_mixcpt.train.optimizer import optimizer_step
from megatron_mixcpt.train.setup import Components, build, read_model_and_mix

CASES = "cases.json"


@dataclass(frozen=True)
class Case:
    """One run of the small problem.

    Attributes:
        name: folder of what it writes.
        values: of its configuration.
        ranks: it takes.
        student, adapter: directories of the weights in training.
    """

    name: str
    values: dict[str, Any]
    ranks: int
    student: str
    adapter: str | None


def observe_all(folder: Path) -> None:
    """Run the cases in which this rank takes part, those of many ranks first."""
    rank = int(os.environ.get("RANK", "0"))
    launched = dict(os.environ)
    for entry in json.loads((folder / CASES).read_text()):
        case = Case(**entry)
        if rank >= case.ranks:
            break  # for good: the cases that follow have no more ranks
        if "WORLD_SIZE" in launched:
            os.environ["WORLD_SIZE"] = str(case.ranks)
        (folder / case.name).mkdir(parents=True, exist_ok=True)
        torch.save(observe(case), folder / case.name / f"rank_{rank}.pt")


def observe(case: Case) -> dict[str, Any]:
    """What this rank has seen: its place in the grid, and of each step what `_step` returns."""
    config = validate(Config, case.values, "certify")
    grid = config.parallel
    if config.uses_teacher and config.teacher.source == "cached":
        _fill_cache(config)
    with parallel_context(**grid.sizes, seed=config.train.seed) as state:
        components = build(config, state)
        stage = cast(Any, components.model.module)
        _move(stage, case)
        components.optimizer.reload_model_params()
        width = stage.arch.padded_vocab_size(grid.tensor) // grid.tensor
        recorder = Recorder(components.run.objective, config, slice(stage.vocab_start, stage.vocab_start + width))
        components.run.objective = recorder
        train = config.train
        batches = train_batches(
            components.task.train_dataset(train.seed, Path(config.run_dir) / "index_cache"),
            Position.start(components.mix, train.seed),
            components.task.collate,
            micro_batch_size=train.micro_batch_size,
            data_rank=state.data_rank,
            data_size=state.data_size,
            num_workers=0,
            device=state.device,
        )
        count = train.global_batch_size // (train.micro_batch_size * state.data_size)
        steps = []
        for step in range(STEPS):
            drawn = [next(batches) for _ in range(count)]
            steps.append(_step(config, components, state, recorder, drawn, step))
        return {
            "place": (state.pipeline_rank, state.tensor_rank, state.context_rank, state.data_rank),
            "expert": state.expert_rank,
            "vocab_start": stage.vocab_start,
            "steps": steps,
        }


def _fill_cache(config: Config) -> None:
    """Everything that the teacher answers, as `mixcpt cache-teacher` writes it, in as many ranks."""
    whole_rows = config.parallel.model_copy(update={"context": 1})
    arch, _ = read_model_and_mix(config)
    with StopRequest() as stop:
        cache_teacher(config.model_copy(update={"parallel": whole_rows}), stop, top_k=arch.vocab_size, bits=32)


def _move(stage: StageModel, case: Case) -> None:
    """Put the weights in training into the stage, which has those that training starts from."""
    if case.adapter is None:
        load_hf(stage, case.student)
        return
    config = cast(AdapterConfig, stage.adapter)
    tensors = read_directory(Path(case.adapter), stage.arch, config.model_copy(update={"init": None}))
    for adapter in stage.adapters():
        for name in adapter.layout.tensors():
            adapter.fill(name, tensors[adapter.layout.key(name)])


def _step(
    config: Config,
    components: Components,
    state: ParallelState,
    recorder: Recorder,
    drawn: list[Batch],
    step: int,
) -> dict[str, Any]:
    """One step, in the order of the training loop."""
    stage = cast(Any, components.model.module)
    recorder.begin()
    kd_factor, rate_factor = pressed(config, step)
    if config.forget is not None:
        recorder.weigh(kd_factor * config.loss.kd_weight)
    components.model.zero_grad_buffer()
    components.optimizer.zero_grad()
    components.run(drawn)
    gradients = _gradients(components, stage)
    norm = optimizer_step(components.optimizer, step, config.train, rate_factor=rate_factor)
    size = config.train.micro_batch_size
    ids = [[(m * state.data_size + state.data_rank) * size + row for row in range(size)] for m in range(len(drawn))]
    rows = {
        sample: (int(batch.source[row]), _sequences(batch, row, components))
        for of, batch in zip(ids, drawn)
        for row, sample in enumerate(of)
    }
    return {
        "ids": ids,
        "rows": rows,
        "micro_batches": recorder.seen,
        "gradients": gradients,
        "norm": norm,
        "weights": _parameters(stage, lambda parameter: parameter),
    }


def _sequences(batch: Batch, row: int, components: Components) -> list[int]:
    """The stored sequences in a row of a micro-batch."""
    key = batch.keys[row]
    if not isinstance(batch, PairBatch):
        return [key.sequence]
    split = components.mix.train_sources[key.source].train
    assert split is not None
    rows = cast(PairRows, components.task.datasets[split.prefix])  # type: ignore[attr-defined]
    return [sequence for pair in rows.pairs_of[key.sequence].tolist() for sequence in (2 * pair, 2 * pair + 1)]


class Recorder:
    """An objective that keeps what another computes: losses and the teacher's logits of every micro-batch.

    Args:
        vocabulary: this rank's columns of the logits, padding included.
    """

    def __init__(self, objective: Objective, config: Config, vocabulary: slice) -> None:
        self._objective = objective
        self.seen: dict[int, dict[str, Tensor]] = {}
        teacher = getattr(objective, "teacher", None)
        if teacher is not None:
            objective.teacher = _RecordedTeacher(teacher, self.seen, config, vocabulary)  # type: ignore[attr-defined]

    @property
    def statistics(self) -> tuple[str, ...]:
        return self._objective.statistics

    def begin(self) -> None:
        """A new step."""
        self.seen = {}
        teacher = getattr(self._objective, "teacher", None)
        if isinstance(teacher, _RecordedTeacher):
            teacher.seen = self.seen

    def weigh(self, kd_weight: float) -> None:
        cast(MixCPTLoss, self._objective).weigh(kd_weight)

    def begin_step(self, batches: list[Batch]) -> None:
        self._objective.begin_step(batches)

    def bind(self, stage: MixGPTModel, index: int, batch: Batch, statistics: Tensor) -> None:
        self._objective.bind(stage, index, batch, statistics)
        loss, seen = stage.loss, self.seen.setdefault(index, {})
        assert loss is not None

        def recorded(hidden: Tensor, labels: Tensor) -> Tensor:
            result = loss(hidden, labels)
            seen["losses"] = result.detach().cpu().clone()  # [b, s], or of pairs [n]
            return result

        stage.loss = recorded
        if batch.places is not None:
            seen["places"] = batch.places.cpu()
        if isinstance(batch, PairBatch):
            seen["reference"], seen["pair_rows"] = batch.reference.cpu(), batch.rows.cpu()

    def count(self, batch: Batch) -> Tensor:
        return self._objective.count(batch)


class _RecordedTeacher:
    def __init__(self, teacher: Teacher, seen: dict[int, dict[str, Tensor]], config: Config, vocabulary: slice) -> None:
        self._teacher, self.seen = teacher, seen
        self._temperature, self._vocabulary = config.loss.temperature, vocabulary

    def begin_step(self, batches: list[Batch]) -> None:
        self._teacher.begin_step(batches)

    @torch.no_grad()
    def target(self, index: int, batch: Batch) -> Target:
        target = self._teacher.target(index, batch)
        if isinstance(target, DenseTarget):
            self._keep(index, target.logits)
        elif isinstance(target, HiddenTarget):
            hidden = target.hidden
            if hidden.shape[0] != batch.tokens.shape[1]:
                hidden = gather_from_sequence_parallel_region(hidden)
            self._keep(index, hidden.float() @ target.head.float().t())  # as the fused loss has them
        else:
            self._keep(index, self._kept(target))
        return target

    def _kept(self, target: TopkTarget) -> Tensor:
        """This rank's logits `[s, b, v/tp]` of an answer of all tokens, up to a constant a token."""
        size = max(self._vocabulary.stop, int(target.ids.max()) + 1)
        logp = target.logp.new_full((*target.ids.shape[:2], size), -torch.inf).scatter(
            -1, target.ids.long(), target.logp
        )
        return self._temperature * logp.log_softmax(-1)[..., self._vocabulary]

    def _keep(self, index: int, logits: Tensor) -> None:
        self.seen.setdefault(index, {})["teacher"] = logits.cpu().clone()  # [s, b, v/tp]


def _gradients(components: Components, stage: Any) -> dict[str, Tensor]:
    """This rank's gradients, whole over the data-parallel ranks also where each keeps a part of them."""
    if not components.model.ddp_config.use_distributed_optimizer:
        return _parameters(stage, _gradient)
    buffers = [*components.model.buffers, *components.model.expert_parallel_buffers]
    kept = [buffer.grad_data.clone() for buffer in buffers]
    for buffer in buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=group)
    gradients = _parameters(stage, _gradient)
    for buffer, before in zip(buffers, kept):
        buffer.grad_data.copy_(before)
    return gradients


def _gradient(parameter: Any) -> Tensor | None:
    """None of what is not trained."""
    return parameter.main_grad if parameter.requires_grad else None


def _parameters(stage: Any, value: Any) -> dict[str, Tensor]:
    """What `value` is of each parameter that has it, by its grid-independent name: this rank's shards, on the host.

    Of a model without adapters all weights, those that are not trained too; else of the adapters.
    """
    if stage.adapter is None:
        found = {slot.name: value(slot.parameter) for slot in stage.slots()}
        return {name: tensor.detach().cpu().clone() for name, tensor in found.items() if tensor is not None}
    return {
        adapter.layout.key(name): value(adapter.get_parameter(name)).detach().cpu().clone()
        for adapter in stage.adapters()
        for name in adapter.layout.tensors()
    }
