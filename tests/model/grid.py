"""One training step of a tiny model on any process grid, its loss and whole gradients collected for comparison."""

import torch

from megatron_mixcpt.architecture.architecture import Architecture, RopeScaling
from megatron_mixcpt.architecture.stages import Stages
from megatron_mixcpt.runtime.parallel import parallel_context

TINY = Architecture(
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=6,
    num_query_groups=2,
    head_dim=8,
    vocab_size=301,
    initializer_range=0.2,  # large enough for attention to matter
)
TIED = Architecture(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=1,  # fewer groups than tensor ranks
    head_dim=12,
    vocab_size=130,
    tie_word_embeddings=True,
    qkv_bias=True,
    qk_norm=True,
    rope_scaling=RopeScaling("llama3", 8.0, original_max_position_embeddings=16),
    initializer_range=0.2,
)
UNLIKE_LLAMA = Architecture(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=12,
    vocab_size=130,
    tie_word_embeddings=True,
    qk_norm_whole=True,
    norms="both",
    norm_plus_one=True,
    activation="gelu_tanh",
    scale_embeddings=True,
    attention_scale=0.25,
    sliding_window=5,
    full_layers=(1, 3),
    local_rope_theta=100.0,
    rotary_dim=8,
    rope_scaling=RopeScaling("yarn", 4.0, original_max_position_embeddings=16, attention_factor=1.2),
    initializer_range=0.2,
)
EXPERTS = Architecture(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    vocab_size=130,
    num_experts=4,
    experts_per_token=2,
    expert_ffn_size=20,
    normalize_routing=True,
    dense_layers=(2,),
    initializer_range=0.2,
)
SEQUENCE, MICROBATCHES, BATCH = 24, 4, 2


def microbatch(arch, index):
    """tokens, labels (some ignored as -100) and document starts of one of the MICROBATCHES, the same for every grid."""
    generator = torch.Generator().manual_seed(index)
    tokens = torch.randint(arch.vocab_size, (BATCH, SEQUENCE), generator=generator)
    labels = tokens.roll(-1, dims=1)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    doc_start = torch.zeros(tokens.shape, dtype=torch.bool)
    doc_start[:, 0] = True
    if index % 2:
        doc_start[0, 5] = doc_start[1, 11] = doc_start[1, 12] = True
    return tokens, labels, doc_start


def cross_entropy(model):
    """A plain vocab-parallel loss: log-sum-exp over the gathered true vocabulary."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    def loss(hidden, labels):
        whole = gather_from_tensor_model_parallel_region(model.output_logits(hidden))[..., : model.arch.vocab_size]
        whole = whole.permute(1, 2, 0).float()  # [b, v, s]
        return torch.nn.functional.cross_entropy(whole, labels, ignore_index=-100, reduction="none")

    return loss


def step(
    arch, tensor=1, pipeline=1, sequence=False, recompute="none", overlap=False, context=1, interleave=1, layers=None
):
    """(summed loss, {name: gradient shard} with its place in the grid) of this process after one step."""
    with parallel_context(tensor=tensor, pipeline=pipeline, context=context, interleave=interleave) as state:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from megatron_mixcpt.attention.context import cut
        from megatron_mixcpt.attention.documents import Documents
        from megatron_mixcpt.model.build import build_gpt

        model = build_gpt(
            arch, sequence_parallel=sequence, recompute=recompute, stages=layers and Stages(layers, pipeline)
        )
        model.parts[-1].loss = cross_entropy(model)
        ddp = DistributedDataParallel(
            model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap), model
        )
        model.config.finalize_model_grads_func = lambda _, *args, **kwargs: finalize_model_grads([ddp], *args, **kwargs)
        if overlap:
            model.config.no_sync_func = ddp.no_sync

        def loss_func(labels, losses):
            total = losses.sum()
            return total, (labels != -100).sum().int(), {"loss": total.detach()}

        def forward_step(batches, module):
            tokens, labels, doc_start = next(batches)
            packing = Documents.of(doc_start)
            positions = packing.position_ids()
            if context > 1:
                packing, places = cut(packing, state.context_rank, context)
                tokens, labels, positions = (x.gather(1, places) for x in (tokens, labels, positions))
            output = module(tokens, positions, packing, labels=labels)
            return output, lambda losses: loss_func(labels, losses)

        mine = [microbatch(arch, i) for i in range(state.data_rank, MICROBATCHES, state.data_size)]
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(mine) for _ in model.parts],
            model=model.parts if interleave > 1 else [ddp],
            num_microbatches=len(mine),
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
        )
        grads = [(slot.name, state.tensor_rank, slot.parameter.main_grad.clone()) for slot in model.slots()]
        return sum(float(report["loss"]) for report in reports), grads


def steps(rank, world_size, cases):
    """Entry point of the spawned processes: one `step` per case."""
    return [step(arch, **case) for arch, case in cases]


def whole_gradients(arch, ranks):
    """{name: whole gradient} from every process's result; copies of the same shard must agree."""
    from megatron_mixcpt.architecture.layout import unshard

    parts = {}
    for _, grads in ranks:
        for name, tensor_rank, grad in grads:
            seen = parts.setdefault(name, {}).setdefault(tensor_rank, grad)
            torch.testing.assert_close(seen, grad, rtol=1e-5, atol=1e-7, msg=f"copies of {name} differ")
    return {name: unshard(name, [by[t] for t in sorted(by)], arch.vocab_size) for name, by in parts.items()}
