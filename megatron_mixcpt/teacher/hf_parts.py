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
from transformers import AttentionInterface
from transformers.modeling_outputs import BaseModelOutputWithPast

from megatron_mixcpt.attention.core import attention, attention_in_blocks
from megatron_mixcpt.attention.documents import Documents
from megatron_mixcpt.errors import ConfigError

ATTENTION = "megatron_mixcpt"  # what transformers calls our attention function


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


class DocumentsInside:
    """Lets a Hugging Face body attend within packed documents, without a mask: its layers call a function of ours.

    Args:
        config: of the body, loaded with `attn_implementation=ATTENTION`.

    Raises ConfigError for an architecture whose attention is no function of queries, keys and values alone.
    """

    def __init__(self, body: Any, config: Any, name: str) -> None:
        kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
        if kinds:
            raise ConfigError(
                f"teacher.hf: {name} has layers of {', '.join(sorted(kinds))}, in which packed documents would see "
                "each other: choose another architecture"
            )
        self._body, self._name = body, name
        self._window = getattr(config, "sliding_window", None)
        if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
            self._window = None

    def __call__(self, packing: Documents, **inputs: Any) -> Any:
        """What the body returns for `inputs`."""
        _Current.packing, _Current.calls, _Current.windows, _Current.name = packing, 0, 0, self._name
        try:
            output = self._body(attention_mask=None, **inputs)
            if _Current.calls == 0:
                raise ConfigError(
                    f"teacher.hf: {self._name} has an attention of its own, in which packed documents would see each "
                    "other: choose another architecture"
                )
            if self._window is not None and packing.max_keys > self._window and _Current.windows == 0:
                raise ConfigError(
                    f"teacher.hf: {self._name} keeps its sliding_window of {self._window} in a mask of its own, which "
                    "packed documents do not have: choose another architecture, or remove sliding_window from its "
                    "config.json if its layers have none"
                )
            return output
        finally:
            _Current.packing = None


class _Current:
    """Of the pass that is running: transformers calls attention functions by name, and not every architecture hands
    them what its body was given."""

    packing: Documents | None = None
    calls = 0
    windows = 0  # calls that were given a sliding window
    name = ""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query `[b, n, s, d]`, key and value `[b, g, s, d]` -> `[b, s, n, d]`, as transformers calls attention."""
    assert _Current.packing is not None
    _Current.calls += 1
    _Current.windows += sliding_window is not None
    if s_aux is not None or position_bias is not None:
        raise ConfigError(
            f"teacher.hf: {_Current.name} adds {'sinks' if s_aux is not None else 'a bias'} to its attention scores, "
            "which is not implemented: choose another architecture"
        )
    options: dict[str, Any] = {"window": sliding_window, "scale": scaling or query.shape[-1] ** -0.5}
    width = value.shape[-1]  # with multi-head latent attention (arXiv 2405.04434) another than that of the keys
    size = max(width, query.shape[-1])
    query, key, value = (nn.functional.pad(x, (0, size - x.shape[-1])) for x in (query, key, value))
    query, key, value = (x.permute(2, 0, 1, 3) for x in (query, key, value))  # [s, b, n, d]
    if softcap is not None:
        out = attention_in_blocks(query, key, value, _Current.packing, **options, softcap=softcap)
    else:
        out = attention(query, key, value, _Current.packing, **options)
    return out.transpose(0, 1)[..., :width], None


AttentionInterface.register(ATTENTION, _attention)
