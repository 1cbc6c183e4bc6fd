"""The model that is trained: megatron-core's GPTModel with our positions and our loss.

Shapes: s sequence, b batch, h hidden, v padded vocabulary, tp tensor-parallel ranks (s/tp under sequence parallelism).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_mixcpt.adapters.adapter import Adapter
from megatron_mixcpt.adapters.layers import adapters_of, attach
from megatron_mixcpt.adapters.layout import adapted_linears
from megatron_mixcpt.adapters.state import PREFIX, adapter_sharded_state, load_adapter_state
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.layout import EMBEDDING, OUTPUT, Slot, slots
from megatron_mixcpt.architecture.stages import Stages
from megatron_mixcpt.attention.documents import Documents
from megatron_mixcpt.config import AdapterConfig
from megatron_mixcpt.model.place import place_here
from megatron_mixcpt.model.rope import Rotary
from megatron_mixcpt.model.routing import Routing
from megatron_mixcpt.model.specs import block_spec

# (hidden [s(/tp), b, h] after the final norm, labels [b, s]) -> fp32 losses whose sum counts, 0 where ignored
Loss = Callable[[Tensor, Tensor], Tensor]


class MixGPTModel(GPTModel):
    """This rank's pipeline stage, or one of its parts in the interleaved schedule.

    `forward(tokens [b, s], position_ids [b, s], packing, labels=None)`: on the last stage what `loss` makes of the
    hidden states, or without labels the logits `[b, s, v/tp]`; on other stages the hidden states for the next one.

    Attributes:
        arch: the whole model's architecture.
        adapter: what is trained in place of the weights, which are frozen then; None trains the weights.
        loss: what is minimised; an objective sets it before each forward pass with labels.
        routing: of a mixture of experts, what its routers do in a step.
        vocab_start: global id of this rank's first vocabulary row.
    """

    def __init__(
        self,
        arch: Architecture,
        stages: Stages,
        settings: TransformerConfig,
        adapter: AdapterConfig | None = None,
        *,
        recompute: str = "none",
        part: int | None = None,
    ) -> None:
        """`settings`: of `specs.transformer_config`, shared by a rank's parts; `part`: which of them, where several."""
        tensor = settings.tensor_model_parallel_size
        super().__init__(
            config=settings,
            transformer_layer_spec=block_spec(arch, settings, recompute, part),
            vocab_size=arch.padded_vocab_size(tensor),
            max_sequence_length=arch.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=part),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=part),
            share_embeddings_and_output_weights=arch.tie_word_embeddings,
            position_embedding_type="none",  # ours are put in by _preprocess
            vp_stage=part,
        )
        self.arch, self.stages = arch, stages
        self.first_layer = get_transformer_layer_offset(settings, vp_stage=part)
        self._recomputes = recompute != "none"
        self.loss: Loss | None = None
        self.routing: Routing | None = None
        self.vocab_start = parallel_state.get_tensor_model_parallel_rank() * (self.vocab_size // tensor)
        self.rotary = Rotary(arch)
        self.adapter = adapter
        if adapter is not None:
            attach(self, adapted_linears(arch, adapter), self.first_layer, place_here(), arch.sliding_window)

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, *args: Any, packed_seq_params: Documents, **kwargs: Any
    ) -> tuple:
        embedded, _, *rest = super()._preprocess(
            input_ids, position_ids, *args, packed_seq_params=packed_seq_params, **kwargs
        )
        if self.arch.scale_embeddings and self.pre_process:
            embedded = embedded * torch.tensor(self.arch.hidden_size**0.5).to(embedded.dtype).item()
        frozen = self.adapter is not None and self.pre_process and torch.is_grad_enabled() and embedded.is_leaf
        if frozen and (self._recomputes or self.config.pipeline_model_parallel_size > 1):
            # Frozen embeddings need no gradient, but recomputation and the pipeline return none to what follows them
            # unless their input asks for one.
            embedded.requires_grad_()
        return embedded, self.rotary(position_ids, packed_seq_params), *rest

    def forward(self, input_ids: Tensor, position_ids: Tensor, packing: Documents, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(input_ids, position_ids, None, *args, packed_seq_params=packing, **kwargs)

    def _postprocess(self, *, hidden_states: Tensor, labels: Tensor | None, **kwargs: Any) -> Tensor:
        if not self.post_process or labels is None:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **kwargs)
        if self.loss is None:
            raise RuntimeError("model.loss is not set")
        return self.loss(hidden_states, labels)

    def head_weight(self) -> Tensor:
        """Last stage only: weight `[v/tp, h]` of the output head, tied or not."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def hidden(self, tokens: Tensor, position_ids: Tensor, packing: Documents) -> Tensor:
        """What `output_logits` takes on the last stage (after the final norm), `[s(/tp), b, h]`; no output head."""
        embedded, angles, *_ = self._preprocess(tokens, position_ids, packed_seq_params=packing)
        return self.decoder(
            hidden_states=embedded, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=packing
        )

    def output_logits(self, hidden: Tensor) -> Tensor:
        """Last stage only: hidden `[s(/tp), b, h]` -> logits `[s, b, v/tp]` through the output head, tied or not."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden, weight=weight)[0]

    @property
    def parts(self) -> list["MixGPTModel"]:
        """What the schedule runs one after the other."""
        return [self]

    def adapters(self) -> list[Adapter]:
        """This stage's adapters, in the order of its layers."""
        return adapters_of(self)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What is trained: the weights, or with adapters those alone."""
        if self.adapter is not None:
            return adapter_sharded_state(self.adapters())
        return self.weights_sharded_state_dict(*args, **kwargs)

    def weights_sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without adapters, and without the extra state of Transformer Engine, which is empty here."""
        if self.arch.layers_differ:
            kwargs["metadata"] = {**(kwargs.get("metadata") or {}), "non_homogeneous_layers": True}
        state = super().sharded_state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if ".adapter." not in key and "_extra_state" not in key}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As torch's; a model with adapters also takes them alone (`sharded_state_dict`), or the weights alone."""
        if self.adapter is not None:
            if all(key.startswith(PREFIX) for key in state_dict):
                return load_adapter_state(self.adapters(), state_dict)
            own = {key: value for key, value in self.state_dict().items() if ".adapter." in key}
            state_dict = own | dict(state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    @torch.no_grad()
    def zero_padding(self) -> None:
        """Clear the vocabulary's padding rows, which a checkpoint of another grid does not hold.

        Their gradient is zero, but zero times a NaN of uninitialised memory is NaN.
        """
        for slot in self.slots():
            if slot.name in (EMBEDDING, OUTPUT):
                slot.parameter[max(self.arch.vocab_size - self.vocab_start, 0) :] = 0

    def slots(self) -> list[Slot]:
        """This rank's weights, without adapters, with their grid-independent names and whole shapes."""
        return slots(self, self.arch, self.first_layer)
