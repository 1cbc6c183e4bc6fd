"""ALoRA in transformers: load an adapter that `mixcpt export --adapter` wrote, and generate with it.

    from megatron_mixcpt.hf_alora import load_alora     # or from the copy of this file beside the adapter
    model = load_alora("medquad-alora")                 # the base model that the adapter names, with the adapter in it
    model.generate(...)

For every adapted layer with weight W and input x:

    z = A x,   a = W_o attention(W_qkv z) (+ z),   y = W x + alpha / rank * B a

where the attention is causal. Its keys and values live in the model's own key-value cache, behind those of the layers,
so greedy and sampled generation, beam search, left padding and cropping work as with any model.
Needs torch, transformers and safetensors only.

Shapes: b batch, s new tokens, t all tokens so far, r rank, n heads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

CONFIG, WEIGHTS = "alora_config.json", "alora.safetensors"
FORMAT = "mixcpt-alora/1"


@dataclass
class _Pass:
    """What the adapters of a model share during one forward pass."""

    mask: Tensor | None = None  # bool [b or 1, 1, s, t], true where a token may attend; None: causal, nothing before
    layers: list[Any] | None = None  # of the cache, one an adapter


class ALoRALinear(nn.Module):
    """A linear layer with its adapter. `forward(x [b, s, in]) -> [b, s, out]`."""

    def __init__(self, base: nn.Linear, settings: dict[str, Any], index: int, shared: _Pass) -> None:
        super().__init__()
        rank = settings["rank"]
        self.base, self.index, self.shared = base, index, shared
        self.heads, self.residual, self.scale = settings["heads"], settings["residual"], settings["alpha"] / rank
        self.alora_A = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.alora_B = nn.Parameter(base.weight.new_empty(base.out_features, rank))
        self.alora_attention_in = nn.Parameter(base.weight.new_empty(3 * rank, rank))
        self.alora_attention_out = nn.Parameter(base.weight.new_empty(rank, rank))

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(x, self.alora_A)  # [b, s, r]
        b, s, rank = z.shape
        qkv = F.linear(z, self.alora_attention_in).view(b, s, 3, self.heads, rank // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [b, n, s, r / n]
        if self.shared.layers is not None:
            key, value = self.shared.layers[self.index].update(key, value)  # [b, n, t, r / n]
        mask = self.shared.mask
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
        a = F.linear(mixed.transpose(1, 2).reshape(b, s, rank), self.alora_attention_out)
        if self.residual:
            a = a + z
        return self.base(x) + F.linear(self.scale * a, self.alora_B)


def is_alora(directory: str | Path) -> bool:
    """Whether `directory` holds an ALoRA adapter."""
    return (Path(directory) / CONFIG).is_file()


def base_of(directory: str | Path) -> str:
    """The base model's directory or name that the adapter was trained on."""
    folder = Path(directory)
    base = _settings(folder)["base_model_name_or_path"]
    return str(folder / base) if base == "base" else base


def load_alora(directory: str | Path, base: str | Path | None = None, **options: Any) -> nn.Module:
    """The base model with the adapter, in evaluation mode.

    Args:
        base: the base model, where it lies elsewhere than the adapter says.
        options: of `AutoModelForCausalLM.from_pretrained`, for example `dtype`.

    Raises ValueError where the directory holds no ALoRA adapter, or one that does not fit the model.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base or base_of(directory), **options)
    return attach_alora(model, directory).eval()


@torch.no_grad()
def attach_alora(model: nn.Module, directory: str | Path) -> nn.Module:
    """Put the adapter into a transformers model of its base, in place."""
    folder = Path(directory)
    settings = _settings(folder)
    tensors = load_file(folder / WEIGHTS)
    shared = _Pass()
    for index, name in enumerate(settings["targets"]):
        parent, _, leaf = name.rpartition(".")
        try:
            base = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{folder}: adapts {name}, which the base model does not have") from None
        adapted = ALoRALinear(base, settings, index, shared)  # type: ignore[arg-type]
        for part, parameter in adapted.named_parameters(recurse=False):
            tensor = tensors.pop(f"{name}.{part}")
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{folder}: {name}.{part} is {tuple(tensor.shape)}, the base model's layer takes "
                    f"{tuple(parameter.shape)}: it is another base model"
                )
            parameter.copy_(tensor)
        setattr(model.get_submodule(parent), leaf, adapted)
    if tensors:
        raise ValueError(f"{folder / WEIGHTS} holds {next(iter(tensors))}, which {CONFIG} does not name")
    decoder: Any = getattr(model, "base_model", model)
    hooks = _Hooks(shared, model.config, len(settings["targets"]), settings["sliding_window"])
    decoder.register_forward_pre_hook(hooks.before, with_kwargs=True)
    decoder.register_forward_hook(hooks.after, always_call=True)
    return model


class _Hooks:
    """Around each pass of the decoder: make room in the cache, and say which tokens may be attended to."""

    def __init__(self, shared: _Pass, config: Any, count: int, window: int | None) -> None:
        self.shared, self.config, self.count, self.window = shared, config, count, window

    def before(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:  # the one positional argument of the decoders of this family
            kwargs = {"input_ids": args[0], **kwargs}
        inputs = kwargs.get("input_ids")
        inputs = kwargs["inputs_embeds"] if inputs is None else inputs
        self._make_room(kwargs)
        past = self.shared.layers[0].get_seq_length() if self.shared.layers else 0
        self.shared.mask = self._mask(kwargs.get("attention_mask"), inputs.shape[1], past, inputs.device)
        return (), kwargs

    def after(self, *_: Any) -> None:
        self.shared.layers = self.shared.mask = None

    def _make_room(self, kwargs: dict[str, Any]) -> None:
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer

        use_cache = kwargs.get("use_cache")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = DynamicCache(config=self.config)
        cache = kwargs.get("past_key_values")
        if cache is None:
            self.shared.layers = None
            return
        if not isinstance(cache, DynamicCache):
            raise ValueError(f"ALoRA needs a DynamicCache, not {type(cache).__name__}: leave cache_implementation out")
        own = self.config.num_hidden_layers
        while len(cache.layers) < own + self.count:
            cache.layers.append(DynamicLayer())
        self.shared.layers = cache.layers[own:]

    def _mask(self, given: Tensor | None, length: int, past: int, device: torch.device) -> Tensor | None:
        """`given`: the model's own argument: none, `[b, t]` with 0 at padding, or `[b, 1, s, t]`, bool or added."""
        if given is not None and given.dim() == 4:
            return given if given.dtype == torch.bool else given > torch.finfo(given.dtype).min / 2
        window = self.window if self.window is not None and past + length > self.window else None
        padded = given is not None and not bool(given.all())
        if past == 0 and window is None and not padded:
            return None
        query = torch.arange(past, past + length, device=device).unsqueeze(1)
        key = torch.arange(past + length, device=device)
        mask = key <= query  # [s, t]
        if window is not None:
            mask = mask & (query - key < window)
        mask = mask[None, None]
        if padded:
            assert given is not None
            real = given[:, None, None, : past + length].bool()
            mask = (mask & real) | (key == query)  # a padding token, which nobody reads, sees itself
        return mask


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        raise ValueError(f"{folder}: no {CONFIG}: not an ALoRA adapter") from None
    if settings.get("format") != FORMAT:
        raise ValueError(f"{folder / CONFIG}: format {settings.get('format')!r}, this module reads {FORMAT!r}")
    return settings
