"""What a model looks like, apart from its weights and from how it is spread over processes."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from megatron_mixcpt.errors import ConfigError

VOCAB_MULTIPLE = 128  # rows a rank; keeps matrix shapes friendly to tensor cores


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts.

    `linear` divides all of them by `factor`; `llama3` divides the slow ones and blends in between
    (Llama 3.1, https://arxiv.org/abs/2407.21783, as configured in its config.json), `yarn` does so by
    https://arxiv.org/abs/2309.00071; `longrope` divides each by a number of its own, one for documents up to the
    original context and one for longer ones (https://arxiv.org/abs/2402.13753).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0  # of yarn and longrope: queries and keys are multiplied with it where they rotate
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the bounds of yarn's blend to whole channels
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """Shape of a decoder-only transformer like Llama (RMSNorm, gated MLP, rotary positions, grouped queries), or of a
    mixture of experts: in place of an MLP many small ones, of which each token goes through a few."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int = 2048
    model_type: str = "llama"  # Hugging Face's name of the family; decides how weights are exported
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    initializer_range: float = 0.02
    sliding_window: int | None = None  # a token attends to itself and the window - 1 tokens before it
    full_layers: tuple[int, ...] = ()  # layers without the window
    local_rope_theta: float | None = None  # of layers with the window, where rotary scaling is for the others alone
    rotary_dim: int | None = None  # channels of a head that rotate; None: all
    qk_norm_whole: bool = False  # a norm of all heads' queries, or keys, together; qk_norm: of each head's
    norms: str = "before"  # where attention and MLP have norms: before, after, both
    norm_plus_one: bool = False  # norms multiply with 1 + weight
    activation: str = "silu"  # of the MLP's gate; or gelu_tanh
    attention_scale: float | None = None  # of scores; None: 1 / sqrt(head_dim)
    scale_embeddings: bool = False  # by sqrt(hidden_size), rounded to the weights' type
    num_experts: int = 0  # of every layer but `dense_layers`, which alone are of `ffn_hidden_size` then; 0: none
    experts_per_token: int = 0
    expert_ffn_size: int = 0  # of each expert
    normalize_routing: bool = False  # the shares of a token's experts are made to add up to 1
    dense_layers: tuple[int, ...] = ()  # layers without experts, in a model that has some

    def window(self, layer: int) -> int | None:
        """The window of one layer, counted from 0."""
        return None if layer in self.full_layers else self.sliding_window

    def has_experts(self, layer: int) -> bool:
        """Whether one layer, counted from 0, has experts in place of an MLP."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def num_expert_layers(self) -> int:
        return sum(self.has_experts(layer) for layer in range(self.num_layers))

    @property
    def mlp_width(self) -> int:
        """FFN channels that a token goes through in a layer, on average over the layers."""
        experts = self.num_expert_layers
        dense = (self.num_layers - experts) * self.ffn_hidden_size
        return (dense + experts * self.experts_per_token * self.expert_ffn_size) // self.num_layers

    @property
    def layers_differ(self) -> bool:
        """Whether some layers have experts and some an MLP."""
        return 0 < self.num_expert_layers < self.num_layers

    @property
    def num_rotary_channels(self) -> int:
        """Of each head, the first ones."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def padded_vocab_size(self, tensor: int) -> int:
        """Rows of the embedding over `tensor` ranks: `vocab_size` rounded up to a multiple of 128 x tensor."""
        multiple = VOCAB_MULTIPLE * tensor
        return -(-self.vocab_size // multiple) * multiple

    def check_layout(self, tensor: int, pipeline: int, interleave: int = 1, expert: int = 1) -> None:
        """Raise ConfigError, naming what does fit, unless the model can be cut `tensor` x `pipeline` ways, with
        `interleave` parts on each pipeline rank, and its experts `expert` ways."""
        if self.num_attention_heads % self.num_query_groups:
            raise ConfigError(
                f"{self.num_attention_heads} attention heads do not divide into {self.num_query_groups} query groups"
            )
        fits = [t for t in range(1, self.num_attention_heads + 1) if self._tensor_fits(t)]
        if tensor not in fits:
            raise ConfigError(
                f"parallel.tensor={tensor} cannot cut this model ({self.num_attention_heads} heads in "
                f"{self.num_query_groups} groups, FFN {' and '.join(map(str, self._ffn_sizes))}): use one of {fits}"
            )
        if self.num_layers < pipeline * interleave:
            also = f" x parallel.interleave={interleave}" if interleave > 1 else ""
            raise ConfigError(
                f"parallel.pipeline={pipeline}{also} makes {pipeline * interleave} parts of {self.num_layers} layers: "
                f"use at most {self.num_layers}"
            )
        if expert > 1 and not self.num_experts:
            raise ConfigError(f"parallel.expert={expert}: this model has no experts: remove it")
        if expert > 1 and self.num_experts % expert:
            fits = [e for e in range(1, self.num_experts + 1) if self.num_experts % e == 0]
            raise ConfigError(
                f"parallel.expert={expert} does not divide this model's {self.num_experts} experts: use one of {fits}"
            )

    def _tensor_fits(self, tensor: int) -> bool:
        groups = self.num_query_groups
        return (
            self.num_attention_heads % tensor == 0
            and all(size % tensor == 0 for size in self._ffn_sizes)
            and (groups % tensor == 0 or (tensor % groups == 0 and not self.qk_norm_whole))
        )

    @property
    def _ffn_sizes(self) -> list[int]:
        """Of its MLPs and of its experts, as far as it has some."""
        dense = [self.ffn_hidden_size] if self.num_expert_layers < self.num_layers else []
        return dense + ([self.expert_ffn_size] if self.num_expert_layers else [])

    @property
    def num_parameters(self) -> int:
        """Trainable parameters without vocabulary padding; tied embeddings count once."""
        return self._num_parameters(self.num_experts)

    @property
    def num_active_parameters(self) -> int:
        """Of these, those that a token meets: all, but of the experts."""
        return self._num_parameters(self.experts_per_token)

    def describe_parameters(self) -> str:
        """How many there are, in a few words."""
        active = f", {self.num_active_parameters / 1e6:.1f} M of them active" if self.num_experts else ""
        return f"{self.num_parameters / 1e6:.1f} M parameters{active}"

    def _num_parameters(self, experts: int) -> int:
        q, kv = self.num_attention_heads * self.head_dim, self.num_query_groups * self.head_dim
        attention = self.hidden_size * (2 * q + 2 * kv)
        attention += (q + 2 * kv if self.qkv_bias else 0) + (2 * self.head_dim if self.qk_norm else 0)
        attention += q + kv if self.qk_norm_whole else 0
        norms = (4 if self.norms == "both" else 2) * self.hidden_size
        mlps = (self.num_layers - self.num_expert_layers) * 3 * self.ffn_hidden_size
        mlps += self.num_expert_layers * (3 * experts * self.expert_ffn_size + self.num_experts)  # and the router
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * (attention + norms) + mlps * self.hidden_size + self.hidden_size + embeddings

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or YAML; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Architecture":
        """Raises pydantic's ValidationError."""
        return TypeAdapter(cls).validate_python(values)


# Random-initialised Llamas to train from scratch; vocab_size is replaced by the tokenizer's.
PRESETS: dict[str, Architecture] = {
    "tiny": Architecture(
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=352,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=32,
        vocab_size=1024,
        tie_word_embeddings=True,
    ),
    "small": Architecture(
        num_layers=12,
        hidden_size=512,
        ffn_hidden_size=1408,
        num_attention_heads=8,
        num_query_groups=4,
        head_dim=64,
        vocab_size=32000,
        tie_word_embeddings=True,
    ),
}
