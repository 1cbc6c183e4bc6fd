"""Mixtures of experts are certified in all their layouts; what the oracle knows of them is what transformers does."""

import dataclasses

import pytest

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.certify.axes import whole_run
from megatron_mixcpt.certify.trial import judged
from tests.helpers.certifying import computed, posed
from tests.helpers.corpus import add_pairs, write_mix

QWEN3 = Architecture(
    num_layers=4,
    hidden_size=96,
    ffn_hidden_size=192,
    num_attention_heads=6,
    num_query_groups=2,
    head_dim=16,
    vocab_size=250,
    model_type="qwen3_moe",
    qk_norm=True,
    num_experts=8,
    experts_per_token=4,
    expert_ffn_size=48,
    normalize_routing=True,
    dense_layers=(1,),
)
MIXTRAL = dataclasses.replace(QWEN3, model_type="mixtral", qk_norm=False, sliding_window=16, dense_layers=(), ffn_hidden_size=48)
OLMOE = dataclasses.replace(MIXTRAL, model_type="olmoe", sliding_window=None, qk_norm_whole=True, normalize_routing=False)
TRAIN = {"micro_batch_size": 2, "global_batch_size": 4}
TRAINED = {**TRAIN, "router": "trained", "router_balance": 0.1, "router_z": 0.01}
RIGHT = {
    "tensor and sequence, fused head": {
        "arch": QWEN3,
        "parallel": {"tensor": 2, "sequence": True},
        "loss": {"fuse_lm_head": True},
        "train": TRAINED,
    },
    "experts over replicas, distributed optimizer": {
        "arch": MIXTRAL,
        "data": 2,
        "parallel": {"expert": 2},
        "train": {**TRAINED, "distributed_optimizer": True, "recompute": "full"},
    },
    "experts over parts of rows": {
        "arch": OLMOE,
        "parallel": {"context": 2, "expert": 2},
        "train": {**TRAINED, "recompute": "mlp"},
    },
    "pipeline, frozen routers": {"arch": QWEN3, "parallel": {"pipeline": 2}, "train": TRAIN},
    "preferences": {
        "arch": MIXTRAL,
        "parallel": {"context": 2, "expert": 2},
        "align": {"method": "dpo"},
        "loss": {"target": "none", "by_kind": {}},
        "train": TRAINED,
    },
    "adapter": {
        "arch": OLMOE,
        "data": 2,
        "parallel": {"expert": 2},
        "adapter": {"method": "lora", "rank": 4, "targets": ["q_proj", "o_proj"]},
        "teacher": {"source": "adapter_off"},
        "train": TRAIN,
    },
    "cached": {
        "arch": MIXTRAL,
        "parallel": {"tensor": 2},
        "teacher": {"source": "cached", "cache": "cache"},
        "train": TRAIN,
    },
}


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    """With preference pairs in its second source."""
    path = write_mix(tmp_path_factory.mktemp("certify") / "data", seq_length=64, train=12)
    add_pairs(path)
    return path


@pytest.mark.distributed
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_within_its_bounds_in_fp32_and_bf16(tmp_path, mix, name):
    sections = dict(RIGHT[name])
    if "cache" in sections.get("teacher", {}):
        sections["teacher"] = sections["teacher"] | {"cache": str(tmp_path / "cache")}
    problem = posed(tmp_path / "posed", mix, **sections)
    (problem,) = computed(problem, ["nothing"], tmp_path / "ranks").values()
    for dtype in ("fp32", "bf16"):
        deviations = judged(problem, whole_run(problem, dtype))
        for kind in {d.what for d in deviations}:
            w = max((d for d in deviations if d.what == kind), key=lambda d: d.share)
            print(dtype, kind, round(w.share, 3), w.told())
        assert [d.told() for d in deviations if d.is_off] == []
        assert {d.what for d in deviations} >= {"samples", "losses", "gradient", "norm", "weights"}
