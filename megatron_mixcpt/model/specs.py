"""Which module stands where in a transformer layer, and the megatron-core configuration around it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from megatron_mixcpt.adapters.layers import AdaptableColumnLinear, AdaptableRowLinear
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.stages import Stages
from megatron_mixcpt.attention.core import DocumentAttention
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.model.experts import ExpertLayer
from megatron_mixcpt.model.norm import HeadsNorm, NormedRowLinear, RMSNorm
from megatron_mixcpt.model.recompute import RecomputedAttention, RecomputedExperts, RecomputedMLP
from megatron_mixcpt.model.self_attention import LayerAttention
from megatron_mixcpt.runtime.cpu_backend import cuda_is_wanted


def _leave(weight: Tensor) -> Tensor:
    """Weights are filled after the model is built (init.py), the same for every layout."""
    return weight


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its approximation with tanh (https://arxiv.org/abs/1606.08415)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": gelu_tanh}


def transformer_config(
    arch: Architecture, stages: Stages, *, sequence_parallel: bool, params_dtype: torch.dtype, recompute: str
) -> TransformerConfig:
    """megatron-core's configuration of `arch` for the current process grid. No TE, no Apex, no dropout."""
    fusions = cuda_is_wanted()  # compiled by Triton
    full, interleaved = recompute == "full", stages.interleave > 1
    settings = TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[arch.activation],
        layernorm_zero_centered_gamma=arch.norm_plus_one,
        softmax_scale=arch.attention_scale,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        sequence_parallel=sequence_parallel and parallel_state.get_tensor_model_parallel_world_size() > 1,
        params_dtype=params_dtype,
        pipeline_model_parallel_layout=stages.megatron_layout() if stages.pipeline > 1 else None,
        pipeline_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        recompute_granularity="full" if full else None,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        deallocate_pipeline_outputs=not interleaved,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        bias_activation_fusion=fusions and arch.activation == "silu",
        bias_dropout_fusion=fusions,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )
    check_schedule(settings)
    return settings


def check_schedule(settings: TransformerConfig) -> None:
    """Raise ConfigError for what makes megatron-core's interleaved schedule compute wrong gradients without a word.

    Seen on gloo with megatron-core 0.16: without overlap a rank's neighbours in a pipeline of two are one and the same,
    and messages of one exchange change places; outputs that are deallocated are still being sent.
    """
    if settings.virtual_pipeline_model_parallel_size is None:
        return
    if not settings.overlap_p2p_comm or settings.batch_p2p_comm:
        raise ConfigError(
            "parallel.interleave needs megatron-core's overlap_p2p_comm, without batch_p2p_comm: otherwise exchanges "
            "are mixed up"
        )
    if settings.deallocate_pipeline_outputs:
        raise ConfigError(
            "parallel.interleave excludes megatron-core's deallocate_pipeline_outputs: they are still being sent"
        )


def layer_spec(arch: Architecture, layer: int, recompute: str = "none") -> ModuleSpec:
    """One transformer layer, counted from 0: self attention and gated MLP or experts, with norms before or after them.
    `recompute`: `train.recompute`."""
    before = IdentityOp if arch.norms == "after" else RMSNorm
    last_linear = AdaptableRowLinear if arch.norms == "before" else NormedRowLinear
    q_norm = k_norm = RMSNorm if arch.qk_norm else IdentityOp
    if arch.qk_norm_whole:
        q_norm = ModuleSpec(module=HeadsNorm, params={"heads": arch.num_attention_heads})
        k_norm = ModuleSpec(module=HeadsNorm, params={"heads": arch.num_query_groups})
    if arch.has_experts(layer):
        mlp = ModuleSpec(module=RecomputedExperts if recompute == "mlp" else ExpertLayer, params={"arch": arch})
    else:
        mlp = ModuleSpec(
            module=RecomputedMLP if recompute == "mlp" else MLP,
            submodules=MLPSubmodules(linear_fc1=AdaptableColumnLinear, linear_fc2=last_linear),
        )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=before,
            self_attention=ModuleSpec(
                module=RecomputedAttention if recompute == "attention" else LayerAttention,
                params={"attn_mask_type": AttnMaskType.causal, "arch": arch},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=AdaptableColumnLinear,
                    core_attention=DocumentAttention,
                    linear_proj=last_linear,
                    q_layernorm=q_norm,
                    k_layernorm=k_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=before,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            # The names megatron-core's own checkpoints use, so that others can read ours.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def block_spec(
    arch: Architecture, config: TransformerConfig, recompute: str, part: int | None
) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage, or of its `part` in the interleaved schedule, and the final norm."""
    first, count = get_transformer_layer_offset(config, vp_stage=part), get_num_layers_to_build(config, vp_stage=part)
    layers = [layer_spec(arch, layer, recompute) for layer in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
