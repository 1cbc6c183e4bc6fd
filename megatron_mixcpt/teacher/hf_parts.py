"""A Hugging Face causal language model taken apart: the part that makes hidden states, and the small rest after it.

The first is large and may lie in pieces anywhere; the second makes this rank's vocabulary shard of the logits, with
whatever the architecture does to logits (scaling, soft caps), since it is the model's own `forward` that runs.

Shapes: b batch, s sequence, h hidden, v vocabulary, tp tensor-parallel size.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.model.attention import window_mask


class _HiddenOnly(BaseModelOutputWithPast):
    """Nothing but hidden states: what else an architecture asks for (router logits) is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _Given(nn.Module):
    """Stands in for the body and returns the hidden states that were put here."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> _HiddenOnly:
        return _HiddenOnly(last_hidden_state=self.hidden)

    @property
    def decoder(self) -> nn.Module:
        """Some architectures (OPT) call the body's decoder."""
        return self


class LogitsShard:
    """From hidden states to this rank's logits.

    Args:
        model: whose body is replaced; nothing but its `forward` is used from now on.
        weight, bias: rows `[width, h]` and `[width]` of the output head that fall to this rank and exist.
        width: vocabulary entries of a rank; those that the teacher does not have get no probability.
    """

    def __init__(self, model: Any, weight: Tensor, bias: Tensor | None, width: int) -> None:
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        head.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            head.bias = nn.Parameter(bias, requires_grad=False)
        self._body = _Given()
        setattr(model, model.base_model_prefix, self._body)
        model.set_output_embeddings(head)
        self._model, self._width = model, width

    def __call__(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """hidden `[b, s, h]` -> `[b, s, v/tp]`."""
        self._body.hidden = hidden
        logits = self._model(input_ids=tokens, use_cache=False).logits
        self._body.hidden = None
        return nn.functional.pad(logits, (0, self._width - logits.shape[-1]), value=-torch.inf)


def check_body(body: nn.Module, name: str) -> None:
    """Raise ConfigError for an architecture that cannot be told where packed documents begin."""
    parameters = inspect.signature(body.forward).parameters
    missing = [key for key in ("position_ids", "attention_mask") if key not in parameters]
    if missing:
        raise ConfigError(
            f"teacher.hf: {name} takes no {' and no '.join(missing)}, so packed documents would see each other: choose "
            "another architecture"
        )


def hf_masks(mask: Tensor | None, config: Any, length: int, dtype: torch.dtype, device: torch.device) -> Any:
    """The `attention_mask` for a body: None, an additive mask `[b, 1, s, s]`, or one for each type of layer.

    `mask` is `document_mask`'s, true where a query may attend. A mask given in four dimensions replaces the one that
    the architecture would make, so sliding windows are put in here.
    """
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if mask is None:
        return None  # one document a row: the architecture's own mask is right
    narrow = window_mask(mask, length, window, device)
    kinds = set(getattr(config, "layer_types", None) or [])
    if {"full_attention", "sliding_attention"} <= kinds:
        return {"full_attention": _additive(mask, dtype), "sliding_attention": _additive(narrow, dtype)}
    return _additive(mask if kinds == {"full_attention"} else narrow, dtype)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert mask is not None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
