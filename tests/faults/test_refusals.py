"""What cannot work is refused before the data starts, with the key to change."""

import json
import multiprocessing
import os
import re
import resource
import signal
import socket

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_mixcpt.cli import main
from megatron_mixcpt.doctor import checks
from megatron_mixcpt.doctor.checks import _clock, examine
from megatron_mixcpt.huggingface.weights import weights_fingerprint
from tests.faults.conftest import STEPS, run_settings
from tests.faults.fleet import at_step, finish, metrics, write_config
from tests.helpers.corpus import write_mix


def limit_memory(extra):
    """Let this process have `extra` bytes more than it has."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, size + extra))


def test_what_does_not_fit_in_memory_is_told_before_the_data_starts(tmp_path, mix, record):
    train = {"micro_batch_size": 8192, "global_batch_size": 8192}
    config = write_config(tmp_path / "train.yaml", run_settings(mix, tmp_path / "run", train=train))
    output = finish(config, faults={0: (limit_memory, 1200 << 20)}, code=2)
    assert "out of memory in a trial step with train.micro_batch_size=8192 x 16 tokens" in output
    assert "train.recompute=full" in output and "Traceback" not in output
    assert not (tmp_path / "run" / "index_cache").exists()
    record("out of memory", "told in a trial step before the data, with the keys to change", "told")


def kill_data_workers():
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)


def test_data_workers_change_nothing_and_their_death_is_explained(tmp_path, mix, straight):
    run = tmp_path / "run"
    config = write_config(tmp_path / "train.yaml", run_settings(mix, run, data={"mix": str(mix), "num_workers": 1}))
    output = finish(config, faults={0: (at_step, 29, kill_data_workers)}, code=1)
    assert "error: a data loader process died" in output and "data.num_workers=0" in output
    finish(config, "data.num_workers=0")
    assert metrics(run, "train/loss") == straight[1]


def test_a_truncated_data_file_is_refused(tmp_path):
    mix = write_mix(tmp_path / "data", seq_length=16, vocab_size=120)
    os.truncate(tmp_path / "data" / "facts-train.bin", 100)
    output = finish(write_config(tmp_path / "train.yaml", run_settings(mix, tmp_path / "run")), code=2)
    assert "facts-train.bin has 100 bytes" in output and "it is truncated" in output and "Traceback" not in output
    assert not (tmp_path / "run").exists() and "model" not in output.split("error:")[0]


def test_another_tokenizer_than_the_models_is_refused(tmp_path, capsys):
    mix = write_mix(tmp_path / "data", vocab_size=4)
    hf = tmp_path / "hf"
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    for folder, words in ((hf, "a b c d"), (tmp_path / "data" / "tokenizer", "a c b d")):
        folder.mkdir()
        vocabulary = {word: number for number, word in enumerate(words.split())}
        Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(folder / "tokenizer.json"))
    described = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4, **shape}
    (hf / "config.json").write_text(json.dumps(described))
    config = write_config(tmp_path / "train.yaml", run_settings(mix, tmp_path / "run", model={"hf": str(hf)}))
    assert main(["train", str(config)]) == 3
    assert re.search(r"token '[bc]' has another id. Preprocess with the model's own", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("override", "message"),
    [("train.dtype=bf16", "train.dtype=fp32, not bf16"), ("train.global_batch_size=8", "train.global_batch_size=4")],
)
def test_a_run_is_not_resumed_with_settings_that_change_what_it_is(tmp_path, mix, straight, override, message):
    config = write_config(tmp_path / "train.yaml", run_settings(mix, straight[0], train={"steps": STEPS + 1}))
    assert message in finish(config, override, code=2)


def test_a_run_is_not_resumed_with_fewer_steps_than_it_has_done(tmp_path, mix, straight):
    config = write_config(tmp_path / "train.yaml", run_settings(mix, straight[0]))
    output = finish(config, f"train.steps={STEPS - 1}", code=2)
    assert f"has {STEPS} steps behind it, train.steps is {STEPS - 1}: raise it" in output


def test_a_finished_run_is_not_started_again(tmp_path, mix, straight):
    config = write_config(tmp_path / "train.yaml", run_settings(mix, straight[0]))
    output = finish(config)
    assert f"finished: {STEPS} of {STEPS} steps" in output and "next: mixcpt export" in output
    assert "resumed" not in output


def test_a_run_is_not_resumed_with_another_models_weights(tmp_path, mix):
    def write_model(seed):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=32, **sizes)).save_pretrained(hf)

    hf = tmp_path / "hf"
    write_model(0)
    train = {"steps": 1, "warmup_steps": 0}
    config = write_config(
        tmp_path / "train.yaml", run_settings(mix, tmp_path / "run", model={"hf": str(hf)}, train=train)
    )
    finish(config)
    write_model(1)
    assert "from other weights than" in finish(config, "train.steps=2", code=2)
    write_model(0)
    output = finish(config, "train.steps=2")
    assert "resumed from" in output and "train.steps 1 -> 2: the schedule is laid over 2 steps" in output


def test_a_run_directory_holds_one_kind_of_training(tmp_path, mix, capsys):
    values = run_settings(mix, tmp_path / "run", train={"steps": 1, "warmup_steps": 0})
    finish(write_config(tmp_path / "train.yaml", values))
    values |= {"align": {"method": "sft"}, "train": values["train"] | {"steps": 2}, "loss": {"target": "none"}}
    assert main(["align", str(write_config(tmp_path / "sft.yaml", values))]) == 2
    assert "another kind of training (train, this is sft): set another run_dir" in capsys.readouterr().err


def test_a_fingerprint_sees_any_tensor_and_the_configuration(tmp_path):
    tensors = {f"layers.{i}.weight": torch.randn(64, 1024) for i in range(8)}
    (tmp_path / "config.json").write_text("{}")

    def fingerprint(**changed):
        save_file(tensors | changed, tmp_path / "model.safetensors")
        return weights_fingerprint(tmp_path)

    before = fingerprint()
    for name, tensor in tensors.items():
        assert fingerprint(**{name: tensor * 1.01}) != before, name
    assert fingerprint() == before
    (tmp_path / "config.json").write_text('{"rope_theta": 7}')
    assert fingerprint() != before


def test_a_launch_variable_that_is_no_number_is_named(tmp_path, mix, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main(["train", str(write_config(tmp_path / "train.yaml", run_settings(mix, tmp_path / "run")))]) == 2
    assert "WORLD_SIZE is 'two', not a number" in capsys.readouterr().err


def test_the_doctor_examines_the_machine(tmp_path, capsys):
    assert main(["doctor", "--dir", str(tmp_path / "new" / "runs")]) == 0
    shown = capsys.readouterr().out
    assert "nothing stands in the way" in shown and "MB/s written and flushed" in shown
    assert "over packed documents" in shown and "reduce-scatter, which cut rows need, work with gloo" in shown
    topics = dict(examine(tmp_path))
    assert {"python", "torch", "megatron-core", "shared memory", "open files", "clock", "disk"} <= topics.keys()
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_sees_gpus_that_torch_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(checks, "DEVICES", tmp_path)
    monkeypatch.delenv("MIXCPT_DEVICE", raising=False)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    assert checks._torch().level == "note"
    (tmp_path / "nvidia0").touch()
    assert checks._torch().level == "problem" and "nvidia0 is there" in checks._torch().text
    monkeypatch.setenv("MIXCPT_DEVICE", "cpu")
    assert checks._torch().level == "note"
    monkeypatch.setenv("MIXCPT_DEVICE", "cuda")
    assert "though MIXCPT_DEVICE is cuda" in checks._torch().text
    monkeypatch.delenv("MIXCPT_DEVICE")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert "this job 8 of them" in checks._torch().text


def test_the_doctor_sees_an_address_that_other_nodes_cannot_reach(monkeypatch):
    for address, level in (("127.0.1.1", "note"), ("0.0.0.0", "ok")):
        monkeypatch.setattr(socket, "gethostbyname", lambda name, address=address: address)
        assert checks._network().level == level


def test_the_doctor_sees_a_wrong_clock_and_a_low_limit(tmp_path):
    assert _clock(tmp_path, 1.0).level == "problem"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert dict(examine(tmp_path))["open files"].level == "problem"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
