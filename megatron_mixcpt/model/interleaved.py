"""A pipeline rank's share of the model in the interleaved schedule: several parts of it in place of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_mixcpt.adapters.adapter import Adapter
from megatron_mixcpt.architecture.layout import Slot
from megatron_mixcpt.config import AdapterConfig
from megatron_mixcpt.model.gpt import MixGPTModel


class InterleavedModel(nn.Module):
    """Parts in order of depth, with the attributes and methods of the one MixGPTModel that other ranks' code expects.

    One set of gradient buffers and one optimizer serve all of them; the schedule runs them one by one.
    """

    def __init__(self, parts: list[MixGPTModel]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(parts)
        first = parts[0]
        self.config, self.arch, self.stages = first.config, first.arch, first.stages
        self.adapter: AdapterConfig | None = first.adapter
        self.vocab_start, self.vocab_size = first.vocab_start, first.vocab_size
        self.tp_group, self.pp_group = first.tp_group, first.pp_group
        self.share_embeddings_and_output_weights = first.share_embeddings_and_output_weights
        self.routing = first.routing
        self.pre_process, self.post_process = first.pre_process, parts[-1].post_process

    @property
    def parts(self) -> list[MixGPTModel]:
        """As they were given."""
        return list(self.chunks)  # type: ignore[arg-type]

    def shared_embedding_or_output_weight(self) -> Tensor:
        """First and last rank: the embedding, or the last stage's copy of it."""
        return self.parts[0 if self.pre_process else -1].shared_embedding_or_output_weight()

    def head_weight(self) -> Tensor:
        return self.parts[-1].head_weight()

    def output_logits(self, hidden: Tensor) -> Tensor:
        return self.parts[-1].output_logits(hidden)

    def adapters(self) -> list[Adapter]:
        return [adapter for part in self.parts for adapter in part.adapters()]

    def slots(self) -> list[Slot]:
        return [slot for part in self.parts for slot in part.slots()]

    @torch.no_grad()
    def zero_padding(self) -> None:
        for part in self.parts:
            part.zero_padding()

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._of_all([part.sharded_state_dict(*args, **kwargs) for part in self.parts])

    def weights_sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._of_all([part.weights_sharded_state_dict(*args, **kwargs) for part in self.parts])

    @staticmethod
    def _of_all(states: list[dict[str, Any]]) -> dict[str, Any]:
        # Parts name their layers from 0 on; the tensors in them know their place in the whole model.
        return {f"{number}.{key}": value for number, state in enumerate(states) for key, value in state.items()}


StageModel = MixGPTModel | InterleavedModel
"""What one pipeline rank has of the model."""
