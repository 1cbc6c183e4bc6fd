"""Mistakes planted into what ranks do for each other: stages, parts of rows, replicas, shards, adapters."""

import contextlib
import dataclasses
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mixcpt.adapters import layers as adapter_layers
from megatron_mixcpt.attention import context, cpu
from megatron_mixcpt.data import batch as batches
from megatron_mixcpt.model import gpt, recompute
from megatron_mixcpt.objectives import step
from megatron_mixcpt.teacher import adapter_off, initial
from megatron_mixcpt.train import setup
from tests.helpers.planted import FAULTS, fault, tensor_size

__all__ = ["FAULTS"]


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
    original = adapter_layers.LinearAdapter.forward
    with mock.patch.object(adapter_layers.LinearAdapter, "forward", lambda self, x: tensor_size() * original(self, x)):
        yield


@fault
def the_adapter_s_values_are_not_summed_over_the_tensor_ranks():
    with mock.patch.object(adapter_layers, "reduce_from_tensor_model_parallel_region", lambda x: x):
        yield


@fault
def the_adapters_stay_on_in_the_teacher():
    with mock.patch.object(adapter_off, "adapters_off", lambda model: contextlib.nullcontext()):
        yield
