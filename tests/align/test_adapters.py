"""Format alignment goes on with the adapters of stage 1, from the model that they made."""

import json
import math

import transformers
import yaml

from megatron_mixcpt.checkpoint import list_checkpoints, read_info
from megatron_mixcpt.cli import main


def run(folder, name, command, **sections):
    values = {
        "train": {"steps": 2, "micro_batch_size": 2, "global_batch_size": 4, "lr": 1e-2, "dtype": "fp32"},
        "adapter": {"method": "alora", "rank": 4},
        "run_dir": str(folder / name),
        **sections,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    assert main([command, str(folder / f"{name}.yaml")]) == 0
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_select_sft_and_dpo_go_on_with_the_adapters_of_stage_one(tmp_path, stage1, model_dir):
    data = {"mix": str(stage1 / "mix.json")}
    run(tmp_path, "mixcpt", "train", model={"hf": str(model_dir)}, data=data, teacher={"source": "adapter_off"})
    select = {"model": {"checkpoint": str(tmp_path / "mixcpt")}, "data": data, "out": str(tmp_path / "selected")}
    (tmp_path / "select.yaml").write_text(yaml.safe_dump(select | {"select": {"n": 6, "pairs": 4, "dtype": "fp32"}}))
    assert main(["select", str(tmp_path / "select.yaml")]) == 0  # ALoRA stays as it is: it is not merged to be scored
    plain = {"target": "none"}
    sft = {"method": "sft"}
    run(tmp_path, "sft", "align", model={"checkpoint": str(tmp_path / "mixcpt")}, data=data, loss=plain, align=sft)
    pairs = data | {"weights": {"pairs": 1.0, "more": 0.0}}
    dpo = {"method": "dpo", "beta": 0.5}
    losses = run(tmp_path, "dpo", "align", model={"checkpoint": str(tmp_path / "sft")}, data=pairs, align=dpo)
    # The reference is the aligned model with its adapters, not the base: at the start nothing tells them apart.
    assert math.isclose(losses[0], math.log(2), rel_tol=1e-5) and losses[1] != losses[0]
    (checkpoint,) = list_checkpoints(tmp_path / "dpo/checkpoints")
    assert read_info(checkpoint).adapter.method == "alora"
    settings = json.loads((checkpoint / "adapter/alora_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(model_dir.resolve())
    assert main(["export", str(tmp_path / "dpo"), "--adapter", "--out", str(tmp_path / "out")]) == 0
    from megatron_mixcpt.hf_alora import load_alora

    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("a question", return_tensors="pt")
    assert load_alora(tmp_path / "out").generate(**tokens, max_new_tokens=3, pad_token_id=0).shape[1] > 3
