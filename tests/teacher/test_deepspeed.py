"""The teacher in pieces against the plain Hugging Face model, for several architectures and grids."""

import itertools
import os
import shutil

import numpy as np
import pytest
import torch

from megatron_mixcpt.attention.documents import Documents
from megatron_mixcpt.config import Config, TeacherConfig, validate
from megatron_mixcpt.data.batch import Batch
from megatron_mixcpt.demo.base_model import save_tiny_tokenizer
from megatron_mixcpt.errors import ConfigError, VerificationError
from megatron_mixcpt.runtime.parallel import parallel_context
from megatron_mixcpt.teacher.build import check_teacher
from megatron_mixcpt.train.setup import read_model_and_mix
from tests.helpers.corpus import write_mix
from tests.helpers.ports import free_port
from tests.helpers.spawn import run_distributed
from tests.teacher.runs import fill
from tests.train.runs import run_steps, settings

pytestmark = pytest.mark.slow

VOCABULARY, WIDTH, LENGTH = 250, 128, 24  # two shards of 128 hold the vocabulary and six entries of padding
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SMALL | {"intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.3}


def save_models(folder):
    """Architectures that differ in names, positions, biases, tying, windows and what they do to logits."""
    import transformers as t

    models = {
        "llama": t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)),
        "gpt2": t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
        ),
        "gemma2": t.Gemma2ForCausalLM(
            t.Gemma2Config(**LLAMA, head_dim=8, sliding_window=5, final_logit_softcapping=3.0)
        ),
        "mistral": t.MistralForCausalLM(t.MistralConfig(**LLAMA, sliding_window=5)),
        "cohere": t.CohereForCausalLM(t.CohereConfig(**LLAMA, logit_scale=0.25)),
        "mixtral": t.MixtralForCausalLM(t.MixtralConfig(**LLAMA, num_local_experts=3)),
    }
    for name, model in models.items():
        torch.manual_seed(3)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(folder / name)
        save_tiny_tokenizer(["the heron waits"], folder / name)
    return list(models)


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    result = []
    for number in range(count):
        tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=generator)
        doc_start = torch.zeros(2, LENGTH, dtype=torch.bool)
        if number != 1:  # one micro-batch of single documents, which is met in another way
            doc_start[0, 7] = doc_start[1, 15] = doc_start[1, 16] = True
        packing = Documents.of(doc_start)
        source = torch.zeros(2, dtype=torch.int64)
        result.append(Batch(tokens, tokens, torch.zeros_like(tokens), packing.position_ids(), packing, source))
    return result


def plain_logits(folder, batch):
    """Every document on its own, through the whole model: `[b, s, v]`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for tokens, positions in zip(batch.tokens, batch.position_ids):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), LENGTH]
        with torch.no_grad():
            parts = [model(tokens[a:b].unsqueeze(0)).logits[0] for a, b in itertools.pairwise(starts)]
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def _answers(rank, world_size, folder, names, offloads, grid):
    from megatron_mixcpt.teacher.deepspeed import DeepSpeedTeacher

    result = {}
    with parallel_context(**grid) as state:
        for name, offload in zip(names, offloads):
            config = TeacherConfig(source="deepspeed", hf=str(folder / name), offload=offload)
            width = WIDTH if state.tensor_size == 2 else 2 * WIDTH
            teacher = DeepSpeedTeacher(
                config, state, vocab_start=state.tensor_rank * width, width=width, dtype=torch.float32
            )
            sizes = [p.ds_tensor.numel() for p in teacher._engine.module.parameters()]
            whole = [p.ds_numel for p in teacher._engine.module.parameters()]
            assert sum(sizes) <= sum(whole) / world_size * 1.1, "every rank holds its piece"
            given = batches()
            teacher.begin_step(given)
            if state.is_last_stage:
                result[name] = [
                    teacher.target(i, batch).logits.transpose(0, 1).numpy() for i, batch in enumerate(given)
                ]
            assert all(p.numel() == 0 for p in teacher._engine.module.parameters()), "nothing stays gathered"
    return result


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return folder, save_models(folder)


@pytest.mark.distributed
@pytest.mark.parametrize("grid", [{"tensor": 2}, {"pipeline": 2}], ids=["TP2", "PP2"])
def test_pieces_answer_like_the_whole_model_and_documents_do_not_see_each_other(models, grid):
    folder, names = models
    names = names if "tensor" in grid else ["llama"]
    offloads = ["cpu" if name == "llama" else "none" for name in names]
    by_rank = run_distributed(_answers, 2, folder, names, offloads, grid, timeout=300)
    for name in names:
        for number, batch in enumerate(batches()):
            shards = [ranks[name][number] for ranks in by_rank if name in ranks]
            found = np.concatenate(shards, -1)
            expected = plain_logits(folder / name, batch).numpy()
            assert np.abs(expected).max() > 0.5
            np.testing.assert_allclose(found[..., :VOCABULARY], expected, atol=2e-5, rtol=2e-5, err_msg=name)
            assert (found[..., VOCABULARY:] == -np.inf).all()


def _train(rank, world_size, values, cache_port=None):
    if cache_port is not None:
        port, os.environ["MASTER_PORT"] = os.environ["MASTER_PORT"], str(cache_port)
        fill(values, top_k=VOCABULARY, bits=32)
        os.environ["MASTER_PORT"] = port
    return run_steps(values)["losses"]


@pytest.fixture(scope="module")
def mix(models, tmp_path_factory):
    path = write_mix(tmp_path_factory.mktemp("data") / "data", vocab_size=VOCABULARY, train=13)
    save_tiny_tokenizer(["the heron waits"], path.parent / "tokenizer")
    return path


@pytest.mark.distributed
def test_training_on_a_copy_of_the_student_is_training_on_the_initial_teacher(models, mix, tmp_path):
    folder, _ = models
    start = {"model": {"hf": str(folder / "llama")}}
    values = {name: settings(mix, tmp_path / name, **start) for name in ("initial", "deepspeed")}
    for value in values.values():
        del value["model"]["preset"]
    values["deepspeed"]["teacher"] = {"source": "deepspeed", "hf": str(folder / "llama"), "offload": "cpu"}
    values["deepspeed"]["parallel"] = {"tensor": 2, "sequence": True}
    expected = run_distributed(_train, 1, values["initial"])[0]
    found = run_distributed(_train, 2, values["deepspeed"], timeout=300)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # The same answers, kept first.
    cached = values["deepspeed"] | {"run_dir": str(tmp_path / "cached")}
    cached["teacher"] = {"source": "cached", "cache": str(tmp_path / "cache"), "hf": str(folder / "llama")}
    found = run_distributed(_train, 2, cached, free_port(), timeout=300)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # Both answer for whole rows, of which a context-parallel rank takes its part.
    for whole in (values["deepspeed"], cached):
        parted = whole | {"parallel": {"context": 2}, "run_dir": str(tmp_path / "parted")}
        found = run_distributed(_train, 2, parted, timeout=300)[0]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def refusal(mix, tmp_path, teacher, sections=None):
    config = validate(Config, settings(mix, tmp_path / "run", teacher=teacher, **sections or {}), "test")
    arch, read = read_model_and_mix(config)
    check_teacher(config, arch, read)


def test_another_tokenizer_is_refused_by_its_hash(models, mix, tmp_path):
    folder, _ = models
    teacher = {"source": "deepspeed", "hf": str(folder / "llama")}
    refusal(mix, tmp_path, teacher)
    other = tmp_path / "other"
    shutil.copytree(folder / "llama", other)
    save_tiny_tokenizer(["quite other words, quite often, quite quietly"], other)
    with pytest.raises(VerificationError, match=r"the tokenizer of .* \([0-9a-f]{32}\) is not that of the model"):
        refusal(mix, tmp_path, teacher | {"hf": str(other)})
    with pytest.raises(ConfigError, match="has no config"):
        refusal(mix, tmp_path, teacher | {"hf": str(tmp_path)})


def test_nvme_without_its_library_says_what_to_install(models, mix, tmp_path, monkeypatch):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    folder, _ = models
    teacher = {"source": "deepspeed", "hf": str(folder / "llama"), "offload": "nvme", "nvme_path": str(tmp_path)}
    with pytest.raises(ConfigError, match="libaio"):
        refusal(mix, tmp_path, teacher)


def test_the_plan_counts_the_pieces_of_the_teacher(models, mix, tmp_path):
    from megatron_mixcpt.plan.estimate import make_plan

    folder, _ = models
    taken = {}
    for offload in ("none", "cpu"):
        teacher = {"source": "deepspeed", "hf": str(folder / "llama"), "offload": offload}
        config = validate(Config, settings(mix, tmp_path / "run", teacher=teacher), "test")
        taken[offload] = make_plan(config, *read_model_and_mix(config), world_size=2).stages[0].teacher
    body = 250 * 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2 * 32) + 32
    head, largest = 256 * 32, 250 * 32  # kept whole; gathered while it is used
    assert taken["none"] == 4 * (body // 2 + head + largest)
    assert taken["cpu"] == 4 * (head + largest)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"source": "deepspeed"}, "needs teacher.hf"),
        ({"source": "initial", "hf": "x"}, "teacher.hf is for"),
        ({"cache": "x"}, "teacher.cache is for teacher.source cached, not initial"),
        ({"source": "deepspeed", "hf": "x", "nvme_path": "/n"}, "teacher.nvme_path is for teacher.offload nvme"),
        ({"source": "deepspeed", "hf": "x", "offload": "nvme"}, "needs teacher.nvme_path"),
        ({"source": "initial", "offload": "cpu"}, "teacher.offload is for the model of teacher.hf"),
    ],
)
def test_settings_that_do_not_fit_are_named(mix, tmp_path, teacher, message):
    with pytest.raises(ConfigError, match=message):
        validate(Config, settings(mix, tmp_path / "run", teacher=teacher), "test")
