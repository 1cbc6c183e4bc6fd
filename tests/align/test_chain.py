"""select -> sft -> dpo -> export: each stage begins where the one before ended."""

import json

import numpy as np
import pytest

from megatron_mixcpt.checkpoint import list_checkpoints, read_info
from megatron_mixcpt.convert.export import export
from tests.align.runs import select_all, select_values, train_all
from tests.helpers.ports import free_port
from tests.helpers.spawn import run_distributed


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def stages(rank, world_size, select, runs):
    select_all(rank, world_size, [select])
    train_all(rank, world_size, runs)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, stage1, model_dir):
    folder = tmp_path_factory.mktemp("chain")

    def run(name, method, model, steps=4, **sections):
        train = {"steps": steps, "micro_batch_size": 1, "global_batch_size": 2, "lr": 1e-3, "dtype": "fp32"}
        return free_port(), {
            "model": model,
            "data": {"mix": str(folder / "selected" / method / "mix.json"), "num_workers": 1 if name == "dpo" else 0},
            "train": train,
            "align": {"method": method},
            "wandb": {"mode": "disabled"},
            "run_dir": str(folder / name),
            **sections,
        }

    select = free_port(), select_values(stage1, {"hf": str(model_dir)}, folder / "selected", valid_fraction=0.4)
    runs = [
        run("sft", "sft", {"hf": str(model_dir)}),
        run("dpo", "dpo", {"checkpoint": str(folder / "sft")}),
        run("lora", "dpo", {"checkpoint": str(folder / "sft")}, adapter={"method": "lora", "rank": 4, "dropout": 0.1}),
    ]
    run_distributed(stages, 1, select, runs, timeout=300)
    return folder


@pytest.mark.distributed
def test_fine_tuning_lowers_the_loss_of_held_out_answers(chain):
    losses = [row["val/asked/loss"] for row in rows_of(chain / "sft") if "val/asked/loss" in row]
    assert losses[-1] < losses[0]
    training = read_info(list_checkpoints(chain / "sft" / "checkpoints")[0]).training
    assert 0 < training.tokens_by_source["asked"] < 4 * 2 * 64  # answers alone count


@pytest.mark.distributed
@pytest.mark.parametrize("run", ["dpo", "lora"])
def test_preferences_start_from_the_fine_tuned_model_and_are_learned(chain, run):
    """The reference is that model, with or without an adapter: the first loss is log 2, then it falls."""
    rows = [row for row in rows_of(chain / run) if "train/loss" in row]
    first = rows[0]
    if run == "dpo":  # the adapter's dropout already moves the first step
        assert first["train/loss"] == pytest.approx(np.log(2.0), abs=1e-12)
        assert first["rewards/kl"] == 0.0
        assert first["rewards/accuracy"] == 0.5  # nothing is preferred yet
        held_out = [value for key, value in rows_of(chain / run)[0].items() if key.endswith("/accuracy")]
        assert held_out and set(held_out) == {0.5}
    held_out = {key: value for key, value in rows_of(chain / run)[0].items() if key.endswith("/loss")}
    assert held_out and all(loss == pytest.approx(np.log(2.0), abs=1e-12) for loss in held_out.values())
    assert rows[-1]["train/loss"] < np.log(2.0) and rows[-1]["rewards/margin"] > 0
    assert rows[-1]["rewards/accuracy"] > 0.5


@pytest.mark.distributed
def test_the_end_of_the_chain_opens_with_transformers(chain):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = chain / "hf"
    export(chain / "dpo", out)
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the liver?"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert model(**ids).logits.isfinite().all()
    card = (out / "README.md").read_text()
    assert "DPO (`sigmoid`, beta 0.1)" in card and "Perplexity" not in card
    rows = [row for row in rows_of(chain / "dpo") if "val/pairs/accuracy" in row]
    after, margin = rows[-1]["val/pairs/accuracy"], rows[-1]["val/pairs/margin"]
    assert f"| pairs | 50.0% | {after:.1%} | +0.0000 | {margin:+.4f} |" in card
