"""Mistakes planted into mixtures of experts: their routers, and what ranks with other experts do for each other."""

import dataclasses
from unittest import mock

import torch
from megatron.core import parallel_state

from megatron_mixcpt.model import dispatch, experts, load
from megatron_mixcpt.model.routing import Routing
from megatron_mixcpt.train import setup
from tests.helpers.planted import fault


@fault
def gradients_of_experts_are_averaged_over_the_ranks_that_have_others():
    original = setup.finalize_model_grads

    def wrong(models, *args, **options):
        for buffer in models[0].expert_parallel_buffers:
            buffer.scale_gradients(1.0 / parallel_state.get_expert_model_parallel_world_size())
        original(models, *args, **options)

    with mock.patch.object(setup, "finalize_model_grads", wrong):
        yield


@fault
def tokens_come_back_in_the_order_of_their_experts():
    def wrong(self, rows):
        return dispatch._Exchange.apply(rows, self._received, self._sent, self._group)

    with mock.patch.object(dispatch.Dispatch, "back", wrong):
        yield


@fault
def the_experts_of_two_ranks_are_exchanged():
    original = load.place_here

    def wrong():
        place = original()
        return dataclasses.replace(place, expert=place.experts - 1 - place.expert)

    with mock.patch.object(load, "place_here", wrong):
        yield


def _router(change):
    original = experts.Router.__init__

    def wrong(self, *args, **options):
        original(self, *args, **options)
        change(self)

    return mock.patch.object(experts.Router, "__init__", wrong)


@fault
def shares_of_a_token_do_not_add_up_to_1():
    with _router(lambda router: setattr(router, "normalize", False)):
        yield


@fault
def gradients_of_routers_are_not_summed_over_the_sequence():
    with _router(lambda router: setattr(router.weight, "sequence_parallel", False)):
        yield


@fault
def the_balance_is_that_of_a_rank_s_part_of_the_sequence():
    with mock.patch.object(Routing, "_over_rows", lambda self, choices: choices.float()):
        yield


@fault
def gradients_of_what_experts_take_are_not_summed_over_the_tensor_ranks():
    with mock.patch.object(experts, "gather_from_sequence_parallel_region", _gathered):
        yield


def _gathered(x):
    """The whole; backward, of what ranks ask of it, this rank's own alone."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)


@fault
def an_expert_that_is_full_drops_tokens():
    original = experts.Experts.forward

    def wrong(self, x, shares, chosen):
        full = torch.nn.functional.one_hot(chosen, self._num_experts).flatten(0, 1).cumsum(0) > len(x) // 2
        dropped = full.gather(1, chosen.flatten().unsqueeze(1)).view(chosen.shape)
        return original(self, x, shares.masked_fill(dropped, 0.0), chosen)

    with mock.patch.object(experts.Experts, "forward", wrong):
        yield
