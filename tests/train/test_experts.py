"""A mixture of experts trains alike on every process grid, goes on in another, and keeps its router where told to."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers
import yaml

from megatron_mixcpt.adapters.files import write_directory
from megatron_mixcpt.cli import main
from megatron_mixcpt.config import AdapterConfig
from megatron_mixcpt.huggingface.config import architecture_from_hf
from megatron_mixcpt.observe.names import documented
from tests.helpers.corpus import write_mix
from tests.helpers.ports import free_port
from tests.helpers.spawn import run_distributed
from tests.model.adapter_models import random_tensors
from tests.model.families import make, make_with_mix, read_all
from tests.train.runs import losses, run_all, settings

pytestmark = pytest.mark.slow

TRAINED = {"router": "trained"}
ADAPTERS = {
    "adapter": {"method": "lora", "rank": 2, "targets": ["q_proj", "o_proj"]},
    "teacher": {"source": "adapter_off"},
}
# On experts too; they start from random values.
LORA = {"adapter": {"method": "lora", "rank": 2, "alpha": 2.0}, "teacher": {"source": "adapter_off"}}
ONE = {
    "trained": {"train": TRAINED},
    "frozen": {"train": {"distributed_optimizer": True}},
    "adapters": ADAPTERS,
    "lora": LORA,
}
TWO = {
    "trained TP2+SP": {"train": TRAINED, "parallel": {"tensor": 2, "sequence": True}},
    "trained PP2": {"train": TRAINED, "parallel": {"pipeline": 2}},
    "trained CP2": {"train": TRAINED, "parallel": {"context": 2}},
    "frozen DP2 distributed optimizer": {"train": {"distributed_optimizer": True}},
    "trained EP2": {"train": TRAINED | {"overlap_grad_reduce": True}, "parallel": {"expert": 2}},
    "lora TP2": LORA | {"parallel": {"tensor": 2}},
    "trained CP2 EP2": {"train": TRAINED, "parallel": {"context": 2, "expert": 2}},
}
FOUR = {
    "trained TP2+SP EP2": {
        "train": TRAINED | {"recompute": "mlp"},
        "parallel": {"tensor": 2, "sequence": True, "expert": 2},
    },
    "trained EP2 PP2": {"train": TRAINED | {"recompute": "full"}, "parallel": {"pipeline": 2, "expert": 2}},
    "frozen DP4 EP2 distributed optimizer": {"train": {"distributed_optimizer": True}, "parallel": {"expert": 2}},
    "lora TP2+SP EP2": LORA | {"train": {"recompute": "mlp"}, "parallel": {"tensor": 2, "sequence": True, "expert": 2}},
    "lora CP2 EP2 PP2": LORA | {"train": {"recompute": "full"}, "parallel": {"context": 2, "expert": 2, "pipeline": 2}},
    "lora DP4 EP2 distributed optimizer": LORA | {"train": {"distributed_optimizer": True}, "parallel": {"expert": 2}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a small Qwen3-MoE, `model`, data for it, and an adapter of it, `lora`."""
    folder = tmp_path_factory.mktemp("experts")
    make("qwen3-experts", folder / "model", vocab_size=256, initializer_range=0.05, num_hidden_layers=2)
    write_mix(folder / "data")
    arch, adapter = architecture_from_hf(folder / "model"), AdapterConfig(**LORA["adapter"])
    (folder / "lora").mkdir()
    write_directory(folder / "lora", arch, adapter, random_tensors(arch, adapter, scale=0.1), None)
    return folder


def configuration(folder, name, **sections):
    train = {"adam_eps": 1e-5, "lr": 3e-4} | sections.pop("train", {})
    if str(name).startswith("lora"):
        sections["adapter"] = sections["adapter"] | {"init": str(folder / "lora")}
    model = {"preset": None, "hf": str(folder / "model")}
    return settings(folder / "data/mix.json", folder / name, model=model, train=train, **sections)


@pytest.fixture(scope="module")
def results(folder):
    runs = {
        world_size: {name: (free_port(), configuration(folder, name, **of)) for name, of in layouts.items()}
        for world_size, layouts in ((1, ONE), (2, TWO), (4, FOUR))
    }
    return {
        name: result
        for world_size in runs
        for name, result in run_distributed(run_all, world_size, runs[world_size])[0].items()
    }


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [*TWO, *FOUR])
def test_several_processes_train_as_one_does(results, layout):
    one, other = results[layout.split()[0]], results[layout]
    np.testing.assert_allclose(other["losses"], one["losses"], rtol=1e-6)
    np.testing.assert_allclose(other["norms"], one["norms"], rtol=1e-5)
    np.testing.assert_allclose(other["megatron's norms"], one["norms"], rtol=1e-5)
    np.testing.assert_allclose(other["routed"], one["routed"], rtol=1e-5)
    for name, gradient in other["gradients"].items():
        scale = np.abs(one["gradients"][name]).max()
        np.testing.assert_allclose(gradient, one["gradients"][name], rtol=0, atol=1e-6 * scale, err_msg=name)
    for name, weight in one["weights"].items():
        np.testing.assert_allclose(other["weights"][name], weight, rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.distributed
def test_a_router_learns_only_where_it_is_asked_to(folder, results):
    before = read_all(folder / "model")["model.layers.0.mlp.gate.weight"].numpy()
    name = "decoder.layers.0.mlp.router.weight"
    assert np.array_equal(results["frozen"]["weights"][name], before)
    assert not np.allclose(results["trained"]["weights"][name], before, atol=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize("run", [run for run in ONE if run != "lora"])
def test_routing_is_compared_with_that_of_the_teacher_which_is_the_base(results, run):
    first, *_, last = ([row[-4:-2] for row in step] for step in results[run]["routed"])
    for layer, (changed, compared) in enumerate(first):
        assert changed == 0 and (compared > 0) == (layer == 0)  # the other layer is dense
    assert 0 < last[0][0] < 0.5 * last[0][1]


@pytest.mark.distributed
def test_lora_of_a_run_is_merged_by_export_in_peft_and_where_another_run_starts(folder, tmp_path):
    def train(name, values, *ranks):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        assert main(["train", str(tmp_path / f"{name}.yaml"), "--nproc", "2", *ranks]) == 0

    run = configuration(folder, tmp_path / "run", train={"steps": 2, "lr": 1e-2}, **LORA)
    train("run", run, "parallel.expert=2")
    # All weights, by next to nothing.
    alone = {"loss": {"target": "none", "by_kind": {}}, "teacher": {"source": "none"}}
    full = configuration(folder, tmp_path / "full", train={"steps": 2, "lr": 1e-9}, **alone)
    train("full", full | {"model": {"checkpoint": str(tmp_path / "run")}}, "parallel.tensor=2")
    for name, arguments in (("run", []), ("run", ["--adapter"]), ("full", [])):
        out = tmp_path / "-".join(["out", name, *arguments])
        assert main(["export", str(tmp_path / name), *arguments, "--out", str(out)]) == 0
    base, merged, full = (read_all(where) for where in (folder / "model", tmp_path / "out-run", tmp_path / "out-full"))
    for key, tensor in merged.items():
        torch.testing.assert_close(full[key], tensor, rtol=0, atol=1e-6)
        adapted = "_proj" in key
        assert (not torch.equal(tensor, base[key])) == adapted, key
    tokens = torch.randint(256, (2, 13), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        beside = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(folder / "model"), tmp_path / "out-run---adapter"
        )(tokens).logits
        expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out-run")(tokens).logits
    torch.testing.assert_close(beside, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.distributed
def test_a_run_goes_on_in_another_layout_and_exports(folder, results, tmp_path, capsys):
    values = configuration(folder, tmp_path / "run", train={"steps": 4}, checkpoint={"every": 2})
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(values))
    first, rest = ["train.steps=2", "train.schedule=constant"], ["train.schedule=constant"]
    spread = ["--nproc", "2", "parallel.expert=2", "train.distributed_optimizer=true"]
    assert main(["train", str(config), *first, *spread]) == 0
    assert main(["train", str(config), "--nproc", "2", "parallel.tensor=2", *rest]) == 0
    whole = values | {"run_dir": str(tmp_path / "whole")}
    config.write_text(yaml.safe_dump(whole))
    assert main(["train", str(config), *rest]) == 0
    expected = losses(tmp_path / "whole")
    for step, loss in losses(tmp_path / "run").items():
        assert loss == pytest.approx(expected[step], rel=1e-6)
    capsys.readouterr()
    assert main(["train", str(config), *rest, "train.steps=5", "train.router=trained"]) == 2
    assert "was trained with train.router=frozen" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    moe = {name: value for row in rows for name, value in row.items() if name.startswith("moe/")}
    assert {
        "moe/balance",
        "moe/z",
        "moe/idle",
        "moe/changed/0",
        "moe/load_max/0",
    } <= moe.keys() and "moe/load_max/1" not in moe
    assert 1.0 < moe["moe/load_max/0"] < 6 and all(documented(name) for name in moe)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    before, after = read_all(folder / "model"), read_all(tmp_path / "out")
    assert after.keys() == before.keys()
    frozen = {name for name in before if torch.equal(before[name], after[name])}
    assert frozen == {name for name in before if name.endswith("mlp.gate.weight")}


@pytest.mark.distributed
def test_the_commands_take_a_mixture(tmp_path, capsys):
    """Alignment over expert ranks, evaluation, generation, and a rehearsal of it."""
    small = {"initializer_range": 0.05, "num_hidden_layers": 2}
    mix = make_with_mix("qwen3-experts", tmp_path / "model", tmp_path / "data", **small)
    config = {
        "model": {"hf": str(tmp_path / "model")},
        "data": {"mix": str(mix)},
        "align": {"method": "sft"},
        "parallel": {"expert": 2},
        "loss": {"target": "none"},
        "teacher": {"source": "none"},
        "train": {"steps": 2, "micro_batch_size": 1, "global_batch_size": 2, "lr": 1e-3, "dtype": "fp32"},
        "run_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["align", str(path), "--nproc", "2"]) == 0
    assert main(["eval", str(tmp_path / "run"), "--out", str(tmp_path / "eval")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "val/facts/ppl" in row]
    found = json.loads((tmp_path / "eval/eval.json").read_text())
    for side, row in (("base", measured[0]), ("model", measured[-1])):
        for source in found[side]["sources"]:
            assert source["value"] == pytest.approx(row[f"val/{source['name']}/ppl"], rel=1e-6)
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "--prompt", "abc", "--max-new-tokens", "5"]) == 0
    text = capsys.readouterr().out
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "out"), "--prompt", "abc", "--max-new-tokens", "5"]) == 0
    assert text.splitlines()[-1] == capsys.readouterr().out.splitlines()[-1]
    del config["align"]
    path.write_text(yaml.safe_dump(config | {"run_dir": str(tmp_path / "next")}))
    assert main(["rehearse", str(path), "--nproc", "2"]) == 0
