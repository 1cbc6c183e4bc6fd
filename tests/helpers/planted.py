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

from megatron_mixcpt.attention.documents import Documents
from megatron_mixcpt.model import gpt, norm, rope
from megatron_mixcpt.objectives import dpo, mixcpt, packed_text
from megatron_mixcpt.teacher import cached, initial
from megatron_mixcpt.teacher.interface import DenseTarget, TopkTarget
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
    def wrong(grads, group):
        return torch.stack([grad.double().square().sum() for grad in grads]).sum()

    with mock.patch.object(optimizer, "sum_of_squares", wrong):
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
def kept_answers_are_of_the_next_token():
    original = cached.CachedTeacher.target

    def wrong(self, index, batch):
        target = original(self, index, batch)
        return TopkTarget(*(x.roll(-1, 0) for x in (target.ids, target.logp, target.gold_logp)))

    with mock.patch.object(cached.CachedTeacher, "target", wrong):
        yield


@fault
def the_budget_s_distillation_weight_never_takes_hold():
    original = mixcpt.MixCPTLoss.weigh

    def wrong(self, kd_weight):
        original(self, self.config.kd_weight)

    with mock.patch.object(mixcpt.MixCPTLoss, "weigh", wrong):
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
