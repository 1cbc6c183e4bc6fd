"""What is said before anything runs: the cost, and a stage of a chain."""

import pytest
import torch
import yaml

from megatron_mixcpt.cli import main
from megatron_mixcpt.config import validate
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.evaluate.loading import load_directory
from megatron_mixcpt.recall.config import RecallConfig
from megatron_mixcpt.recall.cost import estimate, hours
from megatron_mixcpt.slurm.chain import chain_jobs
from tests.recall.models import recall_values


def test_the_memory_that_is_told_is_that_of_weights_and_a_full_cache(chat_model, tmp_path):
    config = validate(RecallConfig, recall_values(tmp_path, chat_model), "test")
    cost = estimate(config)
    model, _ = load_directory(chat_model)
    assert cost.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert cost.weights == 4 * cost.num_parameters
    limits, batch = config.sampling, config.engine.transformers.batch_size
    longest = limits.max_instruction_tokens + limits.max_answer_tokens
    cache = model(torch.ones(batch, longest, dtype=torch.long), use_cache=True).past_key_values
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert cost.cache == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert cost.most_tokens == 21 * longest + 13 * limits.max_text_tokens


def test_hours_fall_with_ranks_and_rise_with_samples(chat_model, tmp_path):
    small = estimate(validate(RecallConfig, recall_values(tmp_path, chat_model), "test"))
    large = estimate(validate(RecallConfig, recall_values(tmp_path, chat_model, n={"text": 1000}), "test"))
    assert hours(small, "H100", 1e15, 4, 0.4) == pytest.approx(hours(small, "H100", 1e15, 1, 0.4) / 4)
    assert hours(large, "H100", 1e15, 1, 0.4) > hours(small, "H100", 1e15, 1, 0.4)


def test_plan_tells_what_a_recall_takes(chat_model, tmp_path, capsys):
    path = tmp_path / "recall.yaml"
    path.write_text(yaml.safe_dump(recall_values(tmp_path, chat_model)))
    assert main(["plan", str(path), "--nproc", "2", "engine.transformers.dtype=bf16"]) == 0
    shown = capsys.readouterr().out
    assert "21 instructions, 13 texts" in shown and "2 ranks" in shown and "arithmetic, not measured" in shown
    assert not (tmp_path / "out").exists()
    assert "fits" not in shown
    assert main(["plan", str(path), "--gpu", "h100-80g"]) == 0
    assert "room        fits: " in capsys.readouterr().out
    assert main(["plan", str(path), "--memory", "0.4"]) == 0
    assert "room        does not fit: " in capsys.readouterr().out
    for option, value in (("--gpu", "abacus"), ("--tokens", "2e9")):
        assert main(["plan", str(path), option, value]) == 2
        assert f"{option} " in capsys.readouterr().err


def test_recall_is_a_stage_of_a_chain_on_all_ranks_of_its_job(chat_model, tmp_path):
    recall = tmp_path / "recall.yaml"
    recall.write_text(yaml.safe_dump(recall_values(tmp_path, chat_model)))
    chain = tmp_path / "chain.yaml"
    stage = {"name": "recall", "command": f"recall {recall}", "nodes": 2, "gpus_per_node": 0, "tasks_per_node": 3}
    chain.write_text(yaml.safe_dump({"out": str(tmp_path / "chain"), "stages": [stage]}))
    (job,) = chain_jobs(str(chain), {})
    assert "--nodes=2" in job.script and "--ntasks-per-node=3" in job.script
    recall.write_text(yaml.safe_dump(recall_values(tmp_path, chat_model, sampling={"top_q": 0.9})))
    with pytest.raises(ConfigError, match=r"recall\.yaml:\d+.*top_p"):
        chain_jobs(str(chain), {})
