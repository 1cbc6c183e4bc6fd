"""What a run will take, computed from its configuration alone: memory of each rank by part, tokens, hours, disk.

The activation terms are a count of the tensors that autograd keeps for each token of this model (norms in fp32, gated
MLP, attention by documents); tests compare them with the peak of real runs.

Symbols: h hidden, f FFN, q and kv channels of queries and of keys, d head dimension, n heads, v vocabulary, s sequence.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from megatron_mixcpt.adapters.layout import adapted_linears, num_parameters
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.layout import EMBEDDING, OUTPUT, is_of_experts, is_whole, whole_shapes
from megatron_mixcpt.architecture.stages import Stages, stages_of
from megatron_mixcpt.config import AdapterConfig, Config
from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.huggingface.weights import open_source
from megatron_mixcpt.kernels.reference import BLOCK_ELEMENTS
from megatron_mixcpt.plan.schedule import most_in_flight

FP32, INT16, INT64 = 4, 2, 8
DTYPE_BYTES = {"fp32": 4, "bf16": 2}
SCRATCH_BUFFERS = 3  # of the reference of the losses
FUSED_CHUNK_TOKENS = 1024  # tokens whose logits exist at a time with loss.fuse_lm_head and in DPO


@dataclass(frozen=True)
class StagePlan:
    """Bytes on one rank of a pipeline stage."""

    num_parameters: int
    num_trained: int
    """All of them, or those of the adapters."""
    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    logits: int
    offloaded: int
    """Host memory: optimizer state that is not on the device (optimizer.offload)."""
    snapshot: int
    """Host memory: copies of this rank's share of weights and optimizer state, which a checkpoint is written from."""

    @property
    def total(self) -> int:
        """On the device; a snapshot is there too where the device is the CPU."""
        return self.weights + self.gradients + self.optimizer + self.teacher + self.activations + self.logits


@dataclass(frozen=True)
class RunPlan:
    """`stages[i]`: a rank of pipeline stage i; byte counts and totals of the run."""

    stages: list[StagePlan]
    cut: Stages
    data_size: int
    num_micro_batches: int
    tokens_per_step: int
    checkpoint: int

    def tokens(self, steps: int) -> int:
        return steps * self.tokens_per_step


def make_plan(config: Config, arch: Architecture, mix: Mix, world_size: int, *, gpu: bool = True) -> RunPlan:
    """`world_size` and the configuration fit together (train.setup.check).

    Args:
        gpu: fused kernels compute the loss and the MLP's activation, which keep less than plain PyTorch on a CPU does.
    """
    grid, train = config.parallel, config.train
    data_size = world_size // grid.replica
    num_micro = train.global_batch_size // (train.micro_batch_size * data_size)
    row_length = config.row_sequences * mix.seq_length
    cut = stages_of(config, arch)
    stages = [_stage(config, arch, cut, row_length, index, data_size, num_micro, gpu) for index in range(grid.pipeline)]
    checkpoint = checkpoint_bytes(arch, train.dtype, config.adapter)
    return RunPlan(stages, cut, data_size, num_micro, train.global_batch_size * row_length, checkpoint)


def checkpoint_bytes(arch: Architecture, dtype: str, adapter: AdapterConfig | None = None) -> int:
    """Size of one checkpoint: weights, two moments, and fp32 master weights where the weights are bf16.

    With an adapter, its own, and its weights a second time as a directory for other programs.
    """
    state = FP32 * (2 if dtype == "fp32" else 3)
    if adapter is not None:
        return num_parameters(arch, adapter) * (2 * DTYPE_BYTES[dtype] + state)
    return arch.num_parameters * (DTYPE_BYTES[dtype] + state)


def kept_checkpoints(config: Config) -> int:
    """How many checkpoints lie in the run directory at most, when none is being written: the newest ones, those of
    every `keep_every`-th step before them, and a result that a forgetting budget chose. By a clock that saves between
    the steps, the newest are as many, and older ones at such a step a rare chance that is not counted."""
    settings, steps = config.checkpoint, config.train.steps
    saved = sorted({*(range(settings.every, steps + 1, settings.every) if settings.every else ()), steps})
    newest = settings.keep if settings.every_minutes else min(settings.keep, len(saved))
    older = saved[: max(len(saved) - settings.keep, 0)]
    spared = [step for step in older if settings.keep_every and step % settings.keep_every == 0]
    return newest + len(spared) + (config.forget is not None)


def _stage(
    config: Config,
    arch: Architecture,
    cut: Stages,
    row_length: int,
    index: int,
    data_size: int,
    num_micro: int,
    gpu: bool,
) -> StagePlan:
    train, grid = config.train, config.parallel
    tensor, pipeline = grid.tensor, grid.pipeline
    size = DTYPE_BYTES[train.dtype]
    last = index == pipeline - 1
    of_experts = _expert_parameters(arch, cut, index) // (tensor * grid.expert)
    count = _other_parameters(arch, tensor, cut, index) + of_experts
    trained = count
    if train.router == "frozen":
        trained -= sum(map(arch.has_experts, cut.layers_of(index))) * arch.num_experts * arch.hidden_size
    if config.adapter is not None:
        other, of_experts = _adapter_parameters(arch, config, cut, index)
        trained = other + of_experts
        count += trained
    state_size = FP32 * (2 if train.dtype == "fp32" else 3)  # of the optimizer, for each parameter
    replicas = data_size * grid.context
    # Those that are this rank's own where replicas share them; fewer ranks have the same experts.
    share = (trained - of_experts + of_experts * grid.expert) / replicas
    held = math.ceil(share) if train.distributed_optimizer else trained  # parameters that this rank updates
    optimizer = held * state_size
    offloaded = config.optimizer.offload == "cpu"
    tokens = train.micro_batch_size * row_length // grid.context
    layers, parts = most_in_flight(cut, index, num_micro)  # the first stage waits longest for its gradients
    kept, again = (tokens * count for count in _layer_bytes(arch, config, gpu))
    transient = max(tokens * 4 * arch.mlp_width // tensor * size, _expert_transient(arch, config, size, gpu))
    hidden = tokens * arch.hidden_size // (tensor if grid.sequence else 1)  # values between two layers
    head = hidden * (2 * FP32 + size) if last else 0  # the final norm
    logits = _logits_bytes(config, arch, tokens, gpu) if last else 0
    # Logits are gone when the gradients reach the layers.
    activations = layers * kept + max(again + transient - logits, 0) + head
    if cut.interleave > 1:
        activations += parts * hidden * size  # what each has sent on is not let go
    if pipeline > 1 and config.runs_teacher and last:
        activations += num_micro * hidden * size  # the teacher's last hidden states of a step
    if config.runs_teacher and config.teacher.source != "deepspeed" and pipeline > 1:  # and its choices of experts
        routed = sum(map(arch.has_experts, cut.layers_of(index))) * arch.experts_per_token * INT16
        activations += num_micro * tokens // (tensor if grid.sequence else 1) * routed
    return StagePlan(
        num_parameters=count,
        num_trained=trained,
        weights=count * size,
        gradients=trained * FP32,
        optimizer=0 if offloaded else optimizer,
        offloaded=held * 4 * FP32 if offloaded else 0,  # weights, two moments, gradients
        teacher=_teacher_bytes(config, arch, count, data_size, last),
        activations=activations,
        logits=logits,
        # Each rank copies what it writes: its share of what data-parallel ranks have between them.
        snapshot=math.ceil(share * (size + state_size)) if config.checkpoint.background else 0,
    )


def _teacher_bytes(config: Config, arch: Architecture, count: int, data_size: int, last: bool) -> int:
    """On the device; what is offloaded is not. `count`: parameters of this rank's part of the student."""
    size = DTYPE_BYTES[config.train.dtype]
    if not config.runs_teacher or config.teacher.source == "adapter_off":
        return 0
    if config.teacher.source != "deepspeed":
        return count * size
    assert config.teacher.hf is not None
    source = open_source(config.teacher.hf)
    numbers = {name: math.prod(source.shape(name)) for name in source.names()}
    grid = config.parallel
    hidden = next(source.shape(name)[-1] for name in source.names() if numbers[name] == max(numbers.values()))
    head = arch.padded_vocab_size(grid.tensor) // grid.tensor * hidden
    numbers.pop("lm_head.weight", None)  # of which each rank has the rows above, and no pieces
    together = Counter[str]()  # transformers has the experts of a layer in one module, which is put together at once
    for name, number in numbers.items():
        together[name.partition(".experts.")[0]] += number
    pieces = sum(numbers.values()) // (data_size * grid.replica)
    here = pieces if config.teacher.offload == "none" else 0
    return size * (here + head + max(together.values()))


def _expert_parameters(arch: Architecture, cut: Stages, index: int) -> int:
    """Of all experts of a stage, over all ranks."""
    return sum(map(arch.has_experts, cut.layers_of(index))) * 3 * _expert_size(arch)


def _expert_size(arch: Architecture) -> int:
    """Parameters of a matrix of all of a layer's experts."""
    return arch.num_experts * arch.expert_ffn_size * arch.hidden_size


def _other_parameters(arch: Architecture, tensor: int, cut: Stages, index: int) -> int:
    """Of a rank: all but those of experts."""
    layers, pipeline = cut.layers_of(index), cut.pipeline
    padded = arch.padded_vocab_size(tensor)
    count = 0
    for name, shape in whole_shapes(arch).items():
        if name in (EMBEDDING, OUTPUT):
            # With tied embeddings the last stage has a copy of its own.
            here = (name == EMBEDDING and index == 0) or (
                index == pipeline - 1 and (name == OUTPUT or (arch.tie_word_embeddings and pipeline > 1))
            )
            count += padded // tensor * shape[1] if here else 0
        elif name.startswith("decoder.layers."):
            if is_of_experts(name):
                continue
            if int(name.split(".")[2]) in layers:
                count += math.prod(shape) // (1 if is_whole(name) else tensor)
        elif index == pipeline - 1:
            count += math.prod(shape)
    return count


def _adapter_parameters(arch: Architecture, config: Config, cut: Stages, index: int) -> tuple[int, int]:
    """Of a rank's adapters: those beside its experts after all others."""
    assert config.adapter is not None
    layers, counts = cut.layers_of(index), [0, 0]
    for linear in adapted_linears(arch, config.adapter):
        if int(linear.linear.split(".")[2]) in layers:
            ranks = config.parallel.expert if linear.experts else 1
            counts[linear.experts > 0] += sum(
                math.prod(shape) // (ranks * (1 if axis is None else config.parallel.tensor))
                for shape, axis in linear.tensors().values()
            )
    return counts[0], counts[1]


def _adapter_bytes(arch: Architecture, config: Config, module: str) -> int:
    """Kept by the adapters of one layer's `module` for each token: z, what goes into B, and queries, keys, values and
    the result of ALoRA's attention."""
    if config.adapter is None:
        return 0
    linears = [linear for linear in adapted_linears(arch, config.adapter) if f".{module}." in linear.linear]
    passes = sum(linear.projections * (arch.experts_per_token if linear.experts else 1) for linear in linears)
    width = config.adapter.rank * passes // arch.num_layers
    tensors = 2 if config.adapter.method == "lora" else 6
    return tensors * width * DTYPE_BYTES[config.train.dtype]


def _layer_bytes(arch: Architecture, config: Config, gpu: bool) -> tuple[int, int]:
    """Of one layer for each token of a micro-batch: kept for backward, and there again while it is computed again."""
    tensor, size, recompute = config.parallel.tensor, DTYPE_BYTES[config.train.dtype], config.train.recompute
    sequence = tensor if config.parallel.sequence else 1
    queries, keys = (heads * arch.head_dim // tensor for heads in (arch.num_attention_heads, arch.num_query_groups))
    count = 4 if arch.norms == "both" else 2
    norms = count * (2 * FP32 + size) * arch.hidden_size // sequence  # x and x/rms of norms, and what they return
    norms += count * FP32
    attention = 2 * (queries + keys) * size  # q, output, k, v
    attention += 4 * arch.head_dim * size  # rotary
    attention += FP32 * (arch.num_attention_heads // tensor) + _adapter_bytes(arch, config, "self_attention")
    fused = gpu and arch.activation == "silu"
    mlp = (3 if fused else 5) * arch.mlp_width // tensor * size  # gate and up, product; gate, silu(gate)
    mlp += _routing_bytes(arch, config.parallel.expert, size)
    mlp += _adapter_bytes(arch, config, "mlp")
    layer = norms + attention + mlp
    if recompute == "full":
        return arch.hidden_size // sequence * size, layer
    again = {"none": 0, "mlp": mlp, "attention": attention}[recompute]
    return layer - again, again


def _routing_bytes(arch: Architecture, expert: int, size: int) -> int:
    """Of one layer's experts for each token, on average over the layers: probabilities of all; the token's input and
    output of each of its experts, and where they lie. Ranks that have experts of their own, `expert` of them, are taken
    to be sent as many tokens as they have."""
    places = 6 if expert > 1 else 4
    chosen = arch.experts_per_token * (2 * arch.hidden_size * size + places * INT64)
    return arch.num_expert_layers * (arch.num_experts * FP32 + chosen) // arch.num_layers


def _expert_transient(arch: Architecture, config: Config, size: int, gpu: bool) -> int:
    """Gradients of one layer's experts on their way into the buffer; on a CPU twice, by expert and together."""
    grid = config.parallel
    return (1 if gpu else 2) * 2 * _expert_size(arch) // (grid.tensor * grid.expert) * size


def _logits_bytes(config: Config, arch: Architecture, tokens: int, gpu: bool) -> int:
    """Student and teacher logits, or student logits and their gradient. On a CPU also what the loss needs beside them;
    in bf16 its matrix product, before the loss, copies one more. With a fused head those of a chunk, and the sum of
    the head's gradients, beside the next chunk's."""
    vocabulary = arch.padded_vocab_size(config.parallel.tensor) // config.parallel.tensor
    if config.fuses_lm_head:
        chunk = min(tokens, FUSED_CHUNK_TOKENS) * vocabulary
        head = vocabulary * arch.hidden_size * FP32 if config.loss.fuse_lm_head and not config.adapter else 0
        each = 0 if config.train.dtype == "fp32" else head + chunk * DTYPE_BYTES[config.train.dtype]
        return head + max((2 if gpu else 3) * chunk * FP32, each)
    logits = tokens * vocabulary * DTYPE_BYTES[config.train.dtype]
    if gpu:
        return 2 * logits
    scratch = SCRATCH_BUFFERS * min(BLOCK_ELEMENTS, tokens * vocabulary) * FP32
    return max(2 * logits + scratch, (2 if config.train.dtype == "fp32" else 3) * logits)
