"""A frozen Hugging Face model of any size as teacher, in pieces over all ranks: DeepSpeed ZeRO-3 inference.

No rank holds the model: its weights are sharded over all processes (on the device, in host memory or on NVMe) and
gathered one module at a time while it runs. What a replica's ranks would compute alike
they share: each runs other micro-batches, and hidden states, not logits, travel between them. Each rank keeps its
vocabulary shard of the output head, so logits exist only where and when the loss reads them.

ZeRO: arXiv 1910.02054; ZeRO-Infinity (offload): arXiv 2104.07857.

Shapes: b micro-batch, s sequence, h hidden of the teacher, v vocabulary, tp tensor-parallel size.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mixcpt.config import TeacherConfig
from megatron_mixcpt.data.batch import Batch, of_part
from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.huggingface.config import load_config
from megatron_mixcpt.huggingface.tokenizers import extended_vocab_size
from megatron_mixcpt.kernels.collectives import all_gather
from megatron_mixcpt.runtime.parallel import ParallelState
from megatron_mixcpt.teacher.interface import DenseTarget

SHARED_MEMORY = "deepspeed_shm_comm"  # as DeepSpeed calls it


def check_hf_teacher(config: TeacherConfig, mix: Mix) -> None:
    """Raise ConfigError or VerificationError unless `config.hf` is a model with the tokenizer of the data."""
    assert config.hf is not None
    folder = Path(config.hf)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"teacher.hf: {folder} has no config.json: give a Hugging Face directory")
    if not mix.tokenizer_dir.is_dir():
        raise ConfigError(
            f"teacher.hf: {mix.tokenizer_dir} is missing, so the teacher's tokenizer cannot be compared with the "
            "data's: preprocess again"
        )
    if config.offload == "nvme":
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            raise ConfigError(
                "teacher.offload nvme: DeepSpeed cannot build its asynchronous file operations here: install the "
                "development files of libaio (Debian: libaio-dev) and a C++ compiler, or set teacher.offload=cpu"
            )
    text = load_config(folder).get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and mix.seq_length > positions:
        raise ConfigError(
            f"teacher.hf: {folder} takes {positions} tokens, and the rows of {mix.path} have {mix.seq_length}: choose "
            "a teacher with a longer context, or preprocess with a smaller seq_length"
        )
    scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    short = scaling.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    if scaling.get("rope_type", scaling.get("type")) == "longrope" and short and mix.seq_length > short:
        raise ConfigError(
            f"teacher.hf: {folder} has rotary scaling longrope, and transformers takes its numbers for long documents "
            f"for all of a batch as soon as one is longer than {short} tokens: answers would depend on the neighbours. "
            f"Preprocess with a seq_length of {short} at most, or choose another teacher"
        )
    rows = text.vocab_size
    needed = extended_vocab_size(folder, mix.tokenizer_dir, rows)
    if needed > rows:
        raise ConfigError(
            f"teacher.hf: {folder} has {rows} embedding rows, the tokenizer of {mix.path} needs {needed}: the teacher "
            "does not know the added tokens"
        )


class DeepSpeedTeacher:
    """Answers with logits. Every rank must run it the same number of times: all methods are collective.

    Args:
        config: `hf`, `offload`, `nvme_path`.
        vocab_start: global id of the student's first logit on this rank, `width` their number (padding included).
        dtype: of weights and activations.
    """

    def __init__(
        self, config: TeacherConfig, state: ParallelState, *, vocab_start: int, width: int, dtype: torch.dtype
    ) -> None:
        from megatron_mixcpt.teacher.hf_parts import DocumentsInside, LogitsShard, check_body

        self._state = state
        # The ranks of this replica: whatever one of them computes, all of them would.
        self._group = state.replica_group if state.replica_size > 1 else None
        self._size = state.replica_size
        self._rank = torch.distributed.get_rank(self._group) if self._group is not None else 0
        self._batches: list[Batch] = []
        self._hidden: dict[int, Tensor] = {}
        model, settings = _load_in_pieces(config, dtype, state)
        check_body(model.base_model, type(model).__name__)
        weight, bias = _head_rows(model, vocab_start, width)
        body = model.base_model
        self._shard = LogitsShard(model, weight.to(state.device), bias, width)
        import deepspeed

        self._engine = deepspeed.initialize(model=body, config=settings)[0]
        self._engine.eval()
        self._answers = DocumentsInside(self._engine, model.config.get_text_config(), type(model).__name__)

    def begin_step(self, batches: list[Batch]) -> None:
        """With pipeline parallelism everything is computed here, since the stages are not in step afterwards."""
        self._batches, self._hidden = batches, {}
        if self._state.pipeline_size > 1:
            for first in range(0, len(batches), self._size):
                self._run(first)

    @torch.no_grad()
    def target(self, index: int, batch: Batch) -> DenseTarget:
        if index not in self._hidden:
            self._run(index)
        hidden = of_part(self._hidden.pop(index), batch)
        logits = self._shard(hidden, batch.tokens)  # [b, s, v/tp]
        return DenseTarget(logits.transpose(0, 1).contiguous())

    @torch.no_grad()
    def _run(self, first: int) -> None:
        """The micro-batches from `first` on, one on each rank of the replica."""
        mine = self._batches[min(first + self._rank, len(self._batches) - 1)]  # all ranks have to run something
        mine = mine.to(self._state.device)  # whole rows, also with context parallelism
        output = self._answers(
            mine.packing, input_ids=mine.tokens, position_ids=mine.position_ids, use_cache=False, return_dict=True
        )
        hidden = all_gather(output.last_hidden_state.unsqueeze(0), self._group)  # [ranks, b, s, h]
        if self._state.is_last_stage:
            count = min(self._size, len(self._batches) - first)
            self._hidden.update({first + number: hidden[number] for number in range(count)})


def _load_in_pieces(config: TeacherConfig, dtype: torch.dtype, state: ParallelState) -> tuple[Any, dict[str, Any]]:
    """The causal language model with its weights partitioned over all ranks, and DeepSpeed's configuration."""
    if state.device.type != "cuda":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from megatron_mixcpt.teacher.hf_parts import ATTENTION

    logger.setLevel("ERROR")
    # On CPUs it would compile collectives of its own, for minutes at the first start; gloo's do.
    deepspeed.ops.__compatible_ops__[SHARED_MEMORY] = False
    # DeepSpeed takes the device of this number, which is another where each process sees one device alone.
    os.environ["LOCAL_RANK"] = str(state.local_rank if state.device.index is None else state.device.index)
    if not deepspeed.comm.is_initialized():
        backend = "nccl" if state.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    assert config.hf is not None
    settings = deepspeed_settings(config, dtype, pin=state.device.type == "cuda")
    # transformers loads in pieces for as long as this object lives.
    pieces = HfDeepSpeedConfig(settings)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.hf, dtype=dtype, local_files_only=True, attn_implementation=ATTENTION, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"teacher.hf: {config.hf}: transformers cannot open it: {error}") from error
    del pieces
    return model.requires_grad_(False).eval(), settings


def deepspeed_settings(config: TeacherConfig, dtype: torch.dtype, *, pin: bool) -> dict[str, Any]:
    """https://www.deepspeed.ai/docs/config-json/: ZeRO-3 without an optimizer."""
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
    if config.offload != "none":
        zero["offload_param"] = {"device": config.offload, "pin_memory": pin}
    if config.offload == "nvme":
        zero["offload_param"]["nvme_path"] = config.nvme_path
    return {
        "train_micro_batch_size_per_gpu": 1,  # asked for, and of no consequence without training
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero,
        "wall_clock_breakdown": False,
    }


def _head_rows(model: Any, start: int, width: int) -> tuple[Tensor, Tensor | None]:
    """This rank's rows of the output head; collective. Gathers that one weight once."""
    import deepspeed

    head = model.get_output_embeddings()
    if head is None:
        raise ConfigError(f"teacher.hf: {type(model).__name__} has no output head that gives logits")
    bias = getattr(head, "bias", None)
    with deepspeed.zero.GatheredParameters([head.weight, *([bias] if bias is not None else [])]):
        rows = slice(min(start, len(head.weight)), min(start + width, len(head.weight)))
        return head.weight.detach()[rows].clone(), bias.detach()[rows].clone() if bias is not None else None
