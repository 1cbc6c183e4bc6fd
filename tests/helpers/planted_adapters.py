"""Mistakes planted into adapters on experts."""

import contextlib
import dataclasses
from unittest import mock

from megatron_mixcpt.adapters import experts, layers
from megatron_mixcpt.adapters.experts import ExpertAdapter
from megatron_mixcpt.teacher import adapter_off
from tests.helpers.planted import fault, tensor_size


@fault
def the_scale_of_an_expert_s_adapter_grows_with_the_tensor_ranks():
    original = ExpertAdapter.forward
    with mock.patch.object(ExpertAdapter, "forward", lambda self, *args: tensor_size() * original(self, *args)):
        yield


@fault
def gradients_of_whole_matrices_beside_an_expert_s_part_are_not_summed():
    with mock.patch.object(experts, "copy_to_tensor_model_parallel_region", lambda x: x):
        yield


@fault
def an_expert_takes_the_adapter_of_the_one_after_it():
    original = ExpertAdapter.forward

    def wrong(self, x, counts, product):
        def others(rows, weight, counts):
            return product(rows, weight.roll(-1, 0), counts)

        return original(self, x, counts, others)

    with mock.patch.object(ExpertAdapter, "forward", wrong):
        yield


def _made(change):
    original = ExpertAdapter.__init__

    def wrong(self, layout, config, place):
        original(self, layout, config, place)
        change(self)

    return mock.patch.object(ExpertAdapter, "__init__", wrong)


@fault
def the_adapters_of_two_ranks_experts_are_exchanged():
    def change(adapter):
        place = adapter.place
        adapter.place = dataclasses.replace(place, expert=place.experts - 1 - place.expert)

    with _made(change):
        yield


@fault
def gradients_of_adapters_are_summed_over_ranks_that_have_other_experts():
    def change(adapter):
        for parameter in adapter.parameters():
            parameter.allreduce = True

    with _made(change):
        yield


@fault
def the_adapters_of_experts_stay_on_in_the_teacher():
    @contextlib.contextmanager
    def off(model):
        others = [adapter for adapter in layers.adapters_of(model) if not isinstance(adapter, ExpertAdapter)]
        with mock.patch.object(layers, "adapters_of", lambda model: others), layers.adapters_off(model):
            yield

    with mock.patch.object(adapter_off, "adapters_off", off):
        yield
