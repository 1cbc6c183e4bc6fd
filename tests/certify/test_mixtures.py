"""Mixtures of experts are certified in all their layouts; what the oracle knows of them is what transformers does."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_mixcpt.certify.axes import DATA, ONE, blamed, variants, whole_run
from megatron_mixcpt.certify.documents import Document
from megatron_mixcpt.certify.experts import parameters_of
from megatron_mixcpt.certify.oracle import Oracle, read_weights
from megatron_mixcpt.certify.problem import _drawn
from megatron_mixcpt.certify.routes import clearly_routed
from megatron_mixcpt.certify.trial import judged
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.convert.certificate import Certificate, current_versions, features_of, settings_of
from megatron_mixcpt.errors import MixcptError
from megatron_mixcpt.rehearse.scale import small_architecture, write_model, write_random_model
from tests.helpers.certifying import EXPERTS, computed, posed
from tests.helpers.corpus import add_pairs, write_mix
from tests.train.runs import settings

pytestmark = pytest.mark.slow

QWEN3 = dataclasses.replace(EXPERTS, dense_layers=(1,))
MIXTRAL = dataclasses.replace(
    QWEN3, model_type="mixtral", qk_norm=False, sliding_window=16, dense_layers=(), ffn_hidden_size=48
)
OLMOE = dataclasses.replace(
    MIXTRAL, model_type="olmoe", sliding_window=None, qk_norm_whole=True, normalize_routing=False
)
FROZEN = {"micro_batch_size": 1, "global_batch_size": 2}
TRAINED = {**FROZEN, "router": "trained", "router_balance": 0.1, "router_z": 0.01}
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
        "train": {**TRAINED, "global_batch_size": 4, "distributed_optimizer": True, "recompute": "full"},
    },
    "experts over parts of rows, preferences": {
        "arch": OLMOE,
        "parallel": {"context": 2, "expert": 2},
        "align": {"method": "dpo"},
        "loss": {"target": "none", "by_kind": {}},
        "train": {**TRAINED, "micro_batch_size": 2},
    },
    "pipeline, frozen routers, cached": {
        "arch": QWEN3,
        "parallel": {"pipeline": 2},
        "teacher": {"source": "cached", "cache": "cache"},
        "train": FROZEN,
    },
    "deepspeed, experts over replicas": {
        "arch": QWEN3,
        "data": 2,
        "parallel": {"expert": 2},
        "teacher": {"source": "deepspeed", "hf": "teacher"},
        "train": FROZEN,
    },
    "adapters on all layers, tensor and sequence": {
        "arch": QWEN3,
        "parallel": {"tensor": 2, "sequence": True},
        "adapter": {"method": "lora", "rank": 4, "alpha": 12.0},
        "train": FROZEN,
    },
    "adapters on experts over replicas, distributed optimizer": {
        "arch": MIXTRAL,
        "data": 2,
        "parallel": {"expert": 2},
        "adapter": {"method": "lora", "rank": 4, "targets": ["*.experts.*"]},
        "teacher": {"source": "adapter_off"},
        "train": {**FROZEN, "global_batch_size": 4, "distributed_optimizer": True, "recompute": "mlp"},
    },
    "adapters on experts over parts of rows, preferences": {
        "arch": OLMOE,
        "parallel": {"context": 2, "expert": 2},
        "adapter": {"method": "lora", "rank": 4, "targets": ["v_proj", "gate_proj", "up_proj", "down_proj"]},
        "align": {"method": "dpo"},
        "loss": {"target": "none", "by_kind": {}},
        "train": {**FROZEN, "micro_batch_size": 2},
    },
    "adapters on all layers, pipeline, cached": {
        "arch": QWEN3,
        "parallel": {"pipeline": 2},
        "adapter": {"method": "lora", "rank": 4},
        "teacher": {"source": "cached", "cache": "cache"},
        "train": {**FROZEN, "recompute": "full"},
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
    problem = posed(tmp_path / "posed", mix, **RIGHT[name])
    (problem,) = computed(problem, ["nothing"], tmp_path / "ranks").values()
    for dtype in ("fp32", "bf16"):
        deviations = judged(problem, whole_run(problem, dtype))
        assert [d.told() for d in deviations if d.is_off] == []
        assert {d.what for d in deviations} >= {"samples", "losses", "gradient", "norm", "weights"}


@pytest.mark.parametrize("arch", [QWEN3, MIXTRAL, OLMOE], ids=lambda arch: arch.model_type)
def test_the_oracle_finds_parameters_by_their_names_in_files(tmp_path, arch):
    """As transformers itself does where it loads them."""
    small = small_architecture(arch, 1, 2, 48)
    write_random_model(small, tmp_path / "model", torch.float32, seed=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    loaded = dict(model.named_parameters())
    named = parameters_of(read_weights(tmp_path / "model"), loaded)
    assert named.keys() == loaded.keys() and all(torch.equal(named[name], loaded[name]) for name in named)


@pytest.mark.parametrize(("parts", "tensor"), [(2, 1), (8, 4)])
def test_no_choice_of_experts_hangs_on_rounding_whatever_the_layout(tmp_path, mix, parts, tensor):
    """Checked as the oracle does it, in bf16; without the marks it would refuse."""
    arch = dataclasses.replace(small_architecture(QWEN3, tensor, parts, 48), vocab_size=200)
    config = validate(Config, settings(mix, tmp_path / "run", loss={"target": "none"}), "test")
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(200, (24,), generator=generator) for _ in range(8)]
    documents = [Document(n, 0, text, torch.ones(24) > 0, torch.zeros_like(text)) for n, text in enumerate(texts)]
    for document in documents:
        document.targets[0] = False

    def check(name, weight):
        write_model(arch, tmp_path / name, torch.bfloat16, weight)
        oracles = [Oracle(config, tmp_path / name, None, dtype) for dtype in (torch.float64, torch.bfloat16)]
        trained = {"model.norm.weight": read_weights(tmp_path / name)["model.norm.weight"]}
        lengths = dict.fromkeys(range(8), 24)
        exact, plain = (oracle.step(trained, documents, lengths, {}) for oracle in oracles)
        oracles[0].routers.check_choices(exact.scores, plain.scores)

    random = _drawn(arch, 0)
    check("marked", clearly_routed(random, arch, 0))
    with pytest.raises(MixcptError, match=r"hangs on rounding in the small model.*train\.seed"):
        check("unmarked", random)


def test_experts_over_ranks_are_an_axis_within_replicas_and_context(tmp_path, mix):
    sections = {"arch": MIXTRAL, "data": 2, "loss": {"target": "none"}}
    problem = posed(tmp_path / "data", mix, parallel={"expert": 2}, train=FROZEN, **sections)
    found = {of.name: (of.config.parallel.expert, of.ranks) for of in variants(problem, "fp32")}
    assert found["parallel.expert"] == (1, 2) and found[DATA] == (1, 1) and found[ONE] == (1, 1)
    both = posed(tmp_path / "both", mix, parallel={"expert": 4, "context": 2}, train=FROZEN, **sections)
    found = {of.name: (of.config.parallel.expert, of.ranks) for of in variants(both, "fp32")}
    assert found["parallel.context"] == found[DATA] == (2, 2) and found["parallel.expert"] == (1, 4)
    assert blamed({"parallel.expert": True, DATA: True, ONE: True}) == "it appears with parallel.expert"
    assert blamed({"parallel.expert": False, DATA: True, ONE: True}) == f"it appears with {DATA}"


def test_a_certificate_speaks_for_the_same_spread_of_the_same_kind_of_experts():
    def config(**sections):
        return validate(Config, settings("mix.json", "run", **sections), "test")

    of, versions = config(parallel={"expert": 4}), current_versions()
    grid = {"tensor": 1, "pipeline": 1, "data": 2, "context": 1, "expert": 2}
    found = Certificate(settings_of(of), features_of(QWEN3), 8, grid, versions, "cpu", [], 10, [])
    assert found.speaks_for(of, QWEN3, 8, versions)
    others = [config(parallel={"expert": 2}), config(parallel={"expert": 4}, train={"router": "trained"})]
    assert not any(found.speaks_for(other, QWEN3, 8, versions) for other in others)
    for other in (dataclasses.replace(QWEN3, normalize_routing=False), dataclasses.replace(QWEN3, dense_layers=())):
        assert not found.speaks_for(of, other, 8, versions)
