"""`mixcpt plan` against what lies on the claimed device: of small models in every layout, and of the large examples."""

import json
from pathlib import Path

import pytest
import yaml

from megatron_mixcpt.config import Config, load_config, validate
from megatron_mixcpt.plan.estimate import make_plan
from megatron_mixcpt.train.setup import check_settings
from tests.device.imagined import resident_bytes
from tests.helpers.corpus import add_pairs, write_mix
from tests.model.families import make
from tests.slurm.published import CONFIGS
from tests.train.runs import settings

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "launch" / "configs"
NO_TEACHER = {"loss": {"target": "none", "by_kind": {}}, "teacher": {"source": "none"}}
RUNS = {  # name -> (ranks, what differs)
    "fp32": (1, {}),
    "bf16": (1, {"train": {"dtype": "bf16"}}),
    "recompute full": (1, {"train": {"recompute": "full"}}),
    "recompute mlp": (1, {"train": {"recompute": "mlp"}}),
    "recompute attention": (1, {"train": {"recompute": "attention"}}),
    "no teacher": (1, NO_TEACHER),
    "fused head": (1, {"train": {"dtype": "bf16"}, "loss": {"fuse_lm_head": True}}),
    "lora": (1, {"adapter": {"method": "lora"}, "teacher": {"source": "adapter_off"}}),
    "alora": (1, {"adapter": {"method": "alora", "rank": 32}} | NO_TEACHER),
    "offload": (1, {"optimizer": {"offload": "cpu"}}),
    "offload, bf16": (1, {"optimizer": {"offload": "cpu"}, "train": {"dtype": "bf16"}}),
    "dpo": (1, {"align": {"method": "dpo"}} | NO_TEACHER),
    "dpo, bf16": (1, {"align": {"method": "dpo"}, "train": {"dtype": "bf16"}} | NO_TEACHER),
    "TP2+SP": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "CP2": (2, {"parallel": {"context": 2}}),
    "DP2, distributed optimizer": (2, {"train": {"dtype": "bf16", "distributed_optimizer": True}}),
    "PP2": (2, {"parallel": {"pipeline": 2, "layers_per_stage": [3, 1]}}),
    "PP2 interleaved": (2, {"parallel": {"pipeline": 2, "interleave": 2}}),
}
SHARDED = {"distributed_optimizer": True}
EXPERTS = {
    "experts": (1, {}),
    "experts, TP2+SP": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "experts over ranks": (2, {"parallel": {"expert": 2}}),
    "experts over ranks, recompute": (4, {"parallel": {"expert": 4}, "train": {"recompute": "full"} | SHARDED}),
    "experts, recompute": (1, {"train": {"recompute": "mlp"}} | NO_TEACHER),
    "experts over ranks, lora": (
        2,
        {"adapter": {"method": "lora", "rank": 64}, "teacher": {"source": "adapter_off"}, "parallel": {"expert": 2}},
    ),
}
EXAMPLES = [  # name, ranks, what differs
    ("llama3-8b-8gpu", 8, []),
    # More optimizer than activations: what its step takes beside its state would be the peak.
    ("llama3-8b-8gpu", 8, ["train.distributed_optimizer=false", "data.seq_length=2048", "train.recompute=full"]),
    # The head's gradient in fp32, twice, while all activations are there.
    ("llama3-8b-8gpu", 8, ["loss.fuse_lm_head=true", "data.seq_length=4096", "train.recompute=full"]),
    ("llama3-70b-64gpu", 64, []),
]


def compared(config, ranks):
    """`{stage: (bytes foreseen, bytes found by part)}` for the first and the last stage of the pipeline."""
    plan = make_plan(config, *check_settings(config, ranks), ranks)
    each = ranks // config.parallel.pipeline
    return {
        stage: (foreseen.total, resident_bytes(config, ranks, stage * each).peak)
        for stage, foreseen in enumerate(plan.stages)
        if stage in (0, config.parallel.pipeline - 1)
    }


def agrees(found):
    for stage, (foreseen, by_part) in found.items():
        parts = {part: f"{count / 2**20:.1f}" for part, count in by_part.items()}
        assert foreseen == pytest.approx(by_part.total(), rel=0.1), f"stage {stage}: {foreseen / 2**20:.1f}, {parts}"


@pytest.fixture(scope="module")
def mixes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    sizes = {"seq_length": 512, "vocab_size": 8000, "train": 6, "valid": 1}
    found = {name: write_mix(folder / name, **sizes) for name in ("text", "pairs")}
    add_pairs(found["pairs"])
    return found


@pytest.mark.parametrize("name", RUNS)
def test_a_small_model_takes_what_is_foreseen(tmp_path, mixes, name):
    ranks, sections = RUNS[name]
    mix = mixes["pairs" if "dpo" in name else "text"]
    train = {"steps": 2, "micro_batch_size": 3, "global_batch_size": 12} | sections.get("train", {})
    values = settings(mix, tmp_path / "run", **sections | {"train": train})
    agrees(compared(validate(Config, values, "test"), ranks))


@pytest.mark.parametrize("name", EXPERTS)
def test_a_small_mixture_of_experts_takes_what_is_foreseen(tmp_path, mixes, name):
    ranks, sections = EXPERTS[name]
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 8, "intermediate_size": 352}
    sizes |= {"head_dim": 32, "num_attention_heads": 4, "vocab_size": 8000, "max_position_embeddings": 512}
    make("qwen3-experts", tmp_path / "model", **sizes)
    train = {"steps": 2, "micro_batch_size": 3, "global_batch_size": 12, "dtype": "bf16"} | sections.get("train", {})
    model = {"preset": None, "hf": str(tmp_path / "model")}
    values = settings(mixes["text"], tmp_path / "run", **sections | {"train": train, "model": model})
    agrees(compared(validate(Config, values, "test"), ranks))


@pytest.mark.parametrize("name, ranks, overrides", EXAMPLES)
def test_an_example_takes_what_is_foreseen(tmp_path, monkeypatch, name, ranks, overrides):
    path = FOLDER / f"{name}.yaml"
    values = yaml.safe_load(path.read_text())
    model = tmp_path / values["model"]["hf"]
    model.mkdir(parents=True)
    content = CONFIGS[model.name]
    (model / "config.json").write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    config = load_config(Config, path, overrides)
    length = config.data.seq_length
    write_mix(Path(config.data.mix).parent, train=2, valid=1, seq_length=length, vocab_size=content["vocab_size"])
    grid = config.parallel
    # As many micro-batches as are in flight: of the others only the teacher's hidden states are kept.
    few = config.train.micro_batch_size * ranks // grid.replica * grid.pipeline
    config = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": few})})
    agrees(compared(config, ranks))
