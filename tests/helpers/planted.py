"""Mistakes planted into the trainer, each a context: what a certificate that can fail must notice.

They are those that trainers have had: a sum over ranks made twice or not at all, a mean of the wrong thing, a neighbour
that is seen, a shard in the wrong place.
"""

import contextlib
import dataclasses
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mixcpt.adapters import layers as adapter_layers
from megatron_mixcpt.attention import context, cpu
from megatron_mixcpt.attention.documents import Documents
from megatron_mixcpt.data import batch as batches
from megatron_mixcpt.model import gpt, norm, recompute, rope
from megatron_mixcpt.objectives import dpo, mixcpt, packed_text, step
from megatron_mixcpt.teacher import adapter_off, initial
from megatron_mixcpt.teacher.interface import DenseTarget
from megatron_mixcpt.train import optimizer, setup

FAULTS = {}


def fault(function):
    """Registers a context under its name, in words."""
    FAULTS[function.__name__.replace("_", " ")] = contextlib.contextmanager(function)
    return function


@fault
def nothing():
    yield


def tensor_size():
    return parallel_state.get_tensor_model_parallel_world_size()


class _SummedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        upstream = upstream.clone()
        dist.all_reduce(upstream, group=parallel_state.get_tensor_model_parallel_group())
        return upstream


@fault
def the_loss_is_all_reduced_under_autograd():
    original = mixcpt.lssd_loss

    def wrong(*args, **options):
        loss, details = original(*args, **options)
        return _SummedBackward.apply(loss), details

    with mock.patch.object(mixcpt, "lssd_loss", wrong):
        yield


@fault
def the_distillation_gradient_is_multiplied_by_the_tensor_size():
    original = mixcpt.lssd_loss

    def wrong(student, teacher, *args, kd_weight, **options):
        with torch.no_grad():
            loss, details = original(student, teacher, *args, kd_weight=kd_weight, **options)
        large, _ = original(student, teacher, *args, kd_weight=kd_weight * tensor_size(), **options)
        return large + (loss - large).detach(), details

    with mock.patch.object(mixcpt, "lssd_loss", wrong):
        yield


@fault
def gradients_of_norms_are_not_summed_over_the_sequence():
    original = norm.RMSNorm.__init__

    def wrong(self, *args, **options):
        original(self, *args, **options)
        self.weight.sequence_parallel = False

    with mock.patch.object(norm.RMSNorm, "__init__", wrong):
        yield


@fault
def padding_counts_in_the_softmax():
    original = mixcpt.MixCPTLoss.__init__

    def wrong(self, *args, vocab_size, **options):
        original(self, *args, vocab_size=-(-vocab_size // 256) * 256 if vocab_size > 128 else 128, **options)

    with mock.patch.object(mixcpt.MixCPTLoss, "__init__", wrong):
        yield


@fault
def of_tied_tokens_the_last_rank_s_is_swapped():
    original = mixcpt.lssd_loss

    def wrong(student, teacher, *args, vocab_start, **options):
        if teacher is not None:
            teacher = teacher + (2e-6 if vocab_start else 0.0)
        return original(student, teacher, *args, vocab_start=vocab_start, **options)

    with mock.patch.object(mixcpt, "lssd_loss", wrong):
        yield


@fault
def labels_of_other_ranks_are_one_token_off():
    original = gpt.MixGPTModel.__init__

    def wrong(self, *args, **options):
        original(self, *args, **options)
        self.vocab_start += self.vocab_start > 0

    with mock.patch.object(gpt.MixGPTModel, "__init__", wrong):
        yield


@fault
def the_gradient_norm_is_that_of_one_rank():
    from megatron.core.optimizer import optimizer as megatron

    def wrong(grads, *args, **options):
        return float(torch.stack([grad.square().sum() for grad in grads]).sum().sqrt())

    with mock.patch.object(megatron, "get_grad_norm_fp32", wrong):
        yield


def _collated(change):
    original = packed_text.collate
    return mock.patch.object(packed_text, "collate", lambda samples: change(original(samples), samples))


@fault
def a_document_sees_its_neighbour():
    with _collated(lambda batch, _: dataclasses.replace(batch, packing=Documents.whole(*batch.tokens.shape))):
        yield


@fault
def prompts_are_trained_on():
    def change(batch, samples):
        return dataclasses.replace(batch, labels=torch.stack([sample["tokens"] for sample in samples])[:, 1:])

    with _collated(change):
        yield


@fault
def the_teacher_is_shifted_by_a_token():
    original = initial.ModelTeacher.target

    def wrong(self, index, batch):
        return DenseTarget(original(self, index, batch).logits.roll(1, 0))

    with mock.patch.object(initial.ModelTeacher, "target", wrong):
        yield


@fault
def rotary_angles_are_of_another_base():
    original = rope.inverse_frequencies
    with mock.patch.object(
        rope, "inverse_frequencies", lambda arch: original(dataclasses.replace(arch, rope_theta=5e3))
    ):
        yield


@fault
def norms_and_biases_are_decayed():
    original = optimizer.build_optimizer

    def wrong(*args, **options):
        built = original(*args, **options)
        for group in built.param_groups:
            group["wd_mult"] = 1.0
        return built

    with mock.patch.object(setup, "build_optimizer", wrong):
        yield


@fault
def the_learning_rate_is_that_of_the_next_step():
    original = optimizer.learning_rate
    with mock.patch.object(optimizer, "learning_rate", lambda step, config: original(step + 1, config)):
        yield


@fault
def the_layers_of_two_stages_are_exchanged():
    original = gpt.get_transformer_layer_offset

    def wrong(settings, **options):
        stages = settings.pipeline_model_parallel_size
        offset = original(settings, **options)
        return offset if stages == 1 else settings.num_layers - settings.num_layers // stages - offset

    with mock.patch.object(gpt, "get_transformer_layer_offset", wrong):
        yield


@fault
def gradients_of_tied_embeddings_are_not_summed_over_the_stages():
    from megatron.core.distributed import finalize_model_grads as megatron

    module = __import__("sys").modules[megatron.__module__]
    with mock.patch.object(module, "_allreduce_word_embedding_grads", lambda *args, **options: None):
        yield


@fault
def the_pipelined_teacher_answers_for_the_next_micro_batch():
    original = initial.ModelTeacher.begin_step

    def wrong(self, micro_batches):
        original(self, micro_batches)
        self._hidden = self._hidden[1:] + self._hidden[:1]

    with mock.patch.object(initial.ModelTeacher, "begin_step", wrong):
        yield


@fault
def every_micro_batch_weighs_the_same():
    original = step.ForwardBackward._reduce

    def wrong(self, *args, **options):
        total, count, found = original(self, *args, **options)
        return total * (20.0 / count.clamp(min=1)), torch.full_like(count, 20), found

    with mock.patch.object(step.ForwardBackward, "_reduce", wrong):
        yield


@fault
def gradients_of_keys_and_values_are_not_summed_over_the_ranks():
    def wrong(x, packing):
        ordered = x.flatten(0, 1).index_select(0, packing.cut.to_ranks).unflatten(0, (-1, x.shape[1]))
        return ordered.chunk(packing.cut.size)[parallel_state.get_context_parallel_rank()].clone()

    with mock.patch.object(context, "summed_part", wrong), mock.patch.object(cpu, "summed_part", wrong):
        yield


@fault
def every_part_of_a_row_counts_its_positions_from_0():
    original = batches.Batch.part

    def wrong(self, rank, size):
        part = original(self, rank, size)
        return dataclasses.replace(part, position_ids=torch.arange(part.tokens.shape[1]).expand_as(part.tokens))

    with mock.patch.object(batches.Batch, "part", wrong):
        yield


@fault
def what_is_recomputed_passes_half_of_its_gradient():
    original = recompute._computed_again

    def wrong(module, function, x):
        return original(module, function, 0.5 * x + 0.5 * x.detach())

    with mock.patch.object(recompute, "_computed_again", wrong):
        yield


def _finalized(change):
    """`change(model, num_tokens)` before the gradients of the ranks are summed."""
    original = setup.finalize_model_grads

    def wrong(models, num_tokens, *args, **options):
        change(models[0], num_tokens)
        original(models, num_tokens, *args, **options)

    return mock.patch.object(setup, "finalize_model_grads", wrong)


def _data_group():
    return parallel_state.get_data_parallel_group()


@fault
def gradients_are_averaged_over_the_ranks():
    with _finalized(lambda model, _: model.scale_gradients(1.0 / _data_group().size())):
        yield


@fault
def the_mean_is_one_of_the_ranks_means():
    def change(model, num_tokens):
        total = num_tokens.clone()
        dist.all_reduce(total, group=_data_group())
        model.scale_gradients(float(total) / _data_group().size() / float(num_tokens))

    with _finalized(change):
        yield


@fault
def all_replicas_read_the_same_rows():
    original = batches.RankSampler.__init__

    def wrong(self, position, micro_batch_size, data_rank, data_size):
        original(self, position, micro_batch_size, 0, data_size)

    with mock.patch.object(batches.RankSampler, "__init__", wrong):
        yield


@fault
def shards_of_updated_weights_are_not_gathered():
    from megatron.core.distributed import DistributedDataParallel

    with mock.patch.object(DistributedDataParallel, "start_param_sync", lambda *args, **options: None):
        yield


@fault
def master_weights_never_reach_the_model():
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

    with contextlib.ExitStack() as stack:
        for kind in (DistributedOptimizer, Float16OptimizerWithFloat16Params):
            stack.enter_context(mock.patch.object(kind, "_copy_main_params_to_model_params", lambda self: None))
        yield


@fault
def the_adapter_s_scale_grows_with_the_tensor_ranks():
    original = adapter_layers.Adapter.forward
    with mock.patch.object(adapter_layers.Adapter, "forward", lambda self, x: tensor_size() * original(self, x)):
        yield


@fault
def the_adapter_s_values_are_not_summed_over_the_tensor_ranks():
    with mock.patch.object(adapter_layers, "reduce_from_tensor_model_parallel_region", lambda x: x):
        yield


@fault
def the_adapters_stay_on_in_the_teacher():
    with mock.patch.object(adapter_off, "adapters_off", lambda model: contextlib.nullcontext()):
        yield


@fault
def chosen_and_rejected_are_exchanged():
    original = dpo.preference_loss

    def wrong(policy, reference, num_tokens, settings):
        return original(*(x.flip(1) for x in (policy, reference, num_tokens)), settings)

    with mock.patch.object(dpo, "preference_loss", wrong):
        yield


@fault
def the_mean_is_over_rows_in_place_of_pairs():
    def wrong(self, batch):
        return torch.tensor(len(batch.source) * (parallel_state.get_context_parallel_rank() == 0), dtype=torch.int32)

    with mock.patch.object(dpo.DPOObjective, "count", wrong):
        yield


@fault
def an_answer_is_the_part_of_it_that_a_rank_has():
    with mock.patch.object(dpo, "context_sum", lambda x: x):
        yield
