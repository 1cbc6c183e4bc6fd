"""The analytic FLOP counts against the matrix products that the model runs."""

import dataclasses
import json

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_mixcpt.architecture.architecture import PRESETS
from megatron_mixcpt.architecture.throughput import executed_flops_per_token, flops_per_token, peak_flops
from megatron_mixcpt.attention import groups as attention_plan
from megatron_mixcpt.attention.documents import QUERIES, Documents
from megatron_mixcpt.attention.reference import dense_mask
from megatron_mixcpt.cli import main
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.data.batch import train_batches
from megatron_mixcpt.data.dataset import train_dataset
from megatron_mixcpt.data.position import Position
from megatron_mixcpt.data_prep.assemble import flags_prefix
from megatron_mixcpt.data_prep.format import DOC_START, open_indexed
from megatron_mixcpt.huggingface.config import config_dict
from megatron_mixcpt.plan.work import work_of
from megatron_mixcpt.runtime.parallel import parallel_context
from megatron_mixcpt.train.setup import build
from tests.helpers.corpus import write_mix
from tests.train.runs import settings

aten = torch.ops.aten
FORWARD = aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
GQA = dataclasses.replace(PRESETS["tiny"], num_layers=2, hidden_size=64, ffn_hidden_size=96, head_dim=16)
DENSE = dataclasses.replace(GQA, num_query_groups=4, tie_word_embeddings=False, head_dim=24)
CASES = {
    "dense": (DENSE, {"loss": {"target": "none"}, "teacher": {"source": "none"}}),
    "grouped queries, tied": (GQA, {"loss": {"target": "none"}, "teacher": {"source": "none"}}),
    "teacher": (DENSE, {}),
    "teacher, recompute": (GQA, {"train": {"recompute": "full"}}),
    "fused head": (DENSE, {"loss": {"fuse_lm_head": True}}),
    "fused head, tied, recompute": (GQA, {"loss": {"fuse_lm_head": True}, "train": {"recompute": "full"}}),
}


def addmm_flops(total, a, b, *args, out_shape=None, **kwargs):
    """Of shapes `[m, n]`, `[m, k]`, `[k, n]`."""
    return 2 * a[0] * a[1] * b[1]


def attention_flops(query, key, value, *args, out_shape=None, **kwargs):
    """q k^T and a v, of shapes `[b, n, s, d]`."""
    b, n, s, d = query
    return 4 * b * n * s * key[2] * d


def attention_backward_flops(upstream, *tensors, out_shape=None, **kwargs):
    """Two products for each of forward's; that it computes scores again is not counted, nor is what causality saves."""
    return 2 * attention_flops(*tensors)


def shares_of(documents):
    """Lengths of documents, each with its share of the tokens."""
    lengths, counts = documents.spans[:, QUERIES].tolist(), documents.spans[:, QUERIES].sum()
    return {length: lengths.count(length) * length / counts for length in lengths}


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    return write_mix(tmp_path_factory.mktemp("flops") / "data", seq_length=32, vocab_size=250)


@pytest.mark.parametrize("case", CASES)
def test_the_count_is_what_a_step_executes(tmp_path, mix, monkeypatch, case):
    arch, sections = CASES[case]
    monkeypatch.setitem(PRESETS, "tiny", arch)
    config = validate(Config, settings(mix, tmp_path / "run", **sections), "test")
    with parallel_context() as state:
        parts = build(config, state)
        batches = train_batches(
            train_dataset(parts.mix, 1, tmp_path),
            Position.start(parts.mix, 1),
            micro_batch_size=2,
            data_rank=0,
            data_size=1,
            num_workers=0,
            device=state.device,
        )
        # What the counter does not know: the CPU's fused attention, one document a call here; addmm in place.
        monkeypatch.setattr(attention_plan, "CALL", 0.0)
        known = {aten.addmm_: addmm_flops, FORWARD: attention_flops, BACKWARD: attention_backward_flops}
        counter, batch = FlopCounterMode(display=False, custom_mapping=known), next(batches)
        with sdpa_kernel(SDPBackend.MATH), counter:
            parts.run([batch])
        lengths = shares_of(batch.packing)
        assert len(lengths) > 2
    found = executed_flops_per_token(
        parts.arch,
        lengths,
        teacher=parts.arch if config.uses_teacher else None,
        recompute=config.train.recompute,
        fuse_lm_head=config.loss.fuse_lm_head,
    )
    assert found * 2 * parts.mix.seq_length == pytest.approx(counter.get_total_flops(), rel=1e-12)


@pytest.mark.parametrize("window, full", [(None, ()), (1, ()), (5, ()), (5, (1, 3)), (12, (0,)), (100, (2,))])
def test_attention_is_counted_by_the_pairs_that_see_each_other(window, full):
    """Of a model with a window in all, some or no layers, over documents longer and shorter than it."""
    arch = dataclasses.replace(DENSE, num_layers=4, sliding_window=window, full_layers=full)
    starts = torch.rand(6, 40, generator=torch.Generator().manual_seed(1)) < 0.1
    pairs = sum(int(dense_mask(starts, arch.window(layer)).sum()) for layer in range(4)) / starts.numel()
    lengths, alone = shares_of(Documents.of(starts)), {1: 1.0}
    assert min(lengths) < 5 and max(lengths) > 12
    for teacher, frozen, passes in ((None, False, 3), (arch, False, 4), (None, True, 3)):
        options = {"teacher": teacher, "frozen": frozen}
        found = flops_per_token(arch, lengths, **options) - flops_per_token(arch, alone, **options)
        more = pairs - arch.num_layers  # than each token with itself in each layer
        assert found == pytest.approx(passes * 4 * arch.num_attention_heads * arch.head_dim * more, rel=1e-9)


def test_plan_and_mfu_count_the_pairs_of_the_mixture(tmp_path, mix, monkeypatch, capsys):
    arch = dataclasses.replace(DENSE, num_layers=4, sliding_window=6, full_layers=(1,))
    monkeypatch.setitem(PRESETS, "tiny", arch)
    values = settings(mix, tmp_path / "run", loss={"target": "none", "by_kind": {}}, teacher={"source": "none"})
    config = validate(Config, values, "test")
    with parallel_context() as state:
        parts = build(config, state)
    pairs = 0.0
    for source, share in zip(parts.mix.train_sources, parts.mix.sample_shares()):
        flags = open_indexed(flags_prefix(source.train.prefix))
        starts = torch.stack([torch.from_numpy(flags[row] & DOC_START).bool() for row in range(len(flags))])
        found = sum(int(dense_mask(starts, arch.window(layer)).sum()) for layer in range(4))
        pairs += share * found / starts.numel()
    matrices = parts.arch.num_parameters - parts.arch.vocab_size * arch.hidden_size - 9 * arch.hidden_size  # and norms
    expected = 6 * matrices + 3 * 4 * arch.num_attention_heads * arch.head_dim * pairs
    assert parts.task.flops_per_token == pytest.approx(expected, rel=1e-9)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values))
    assert main(["plan", str(tmp_path / "train.yaml")]) == 0
    assert f"{expected / 1e9:.4g} GFLOP a token for the model" in capsys.readouterr().out


def test_a_teacher_of_another_size_is_counted_as_what_it_is(tmp_path, mix):
    """Of teacher.source deepspeed; one whose family nobody knows is left out, and that is told."""
    large = dataclasses.replace(DENSE, num_layers=6, hidden_size=128)
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_dict(large)))
    teacher = {"source": "deepspeed", "hf": str(folder)}
    config = validate(Config, settings(mix, tmp_path / "run", teacher=teacher), "test")
    lengths = {8: 0.25, 32: 0.75}
    alone, of_teacher = flops_per_token(DENSE, lengths), flops_per_token(large, lengths) / 3
    assert work_of(config, DENSE, lengths).model == pytest.approx(alone + of_teacher, rel=1e-12)
    assert of_teacher > alone
    padded = {"vocab_size": DENSE.padded_vocab_size(1)}  # the teacher's head has the student's rows
    students = executed_flops_per_token(DENSE, lengths)
    executed = executed_flops_per_token(dataclasses.replace(large, **padded), lengths) / 3
    assert work_of(config, DENSE, lengths).executed == pytest.approx(students + executed, rel=1e-12)

    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    work = work_of(config, DENSE, lengths)
    assert work.model == pytest.approx(alone, rel=1e-12) and not work.counts_teacher


def test_executed_attention_goes_without_what_causality_saves():
    arch = dataclasses.replace(DENSE, vocab_size=256, sliding_window=6, full_layers=(1,))  # no padding
    for teacher in (None, arch):
        executed = executed_flops_per_token(arch, {32: 1.0}, teacher=teacher)
        saved = 31 / 2 + 6 * 5 / 2 / 32  # keys a token: of a whole square, and of the first queries of a window
        causal = 4.0 * arch.num_attention_heads * arch.head_dim * saved * (4 if teacher else 3)
        assert flops_per_token(arch, {32: 1.0}, teacher=teacher) == pytest.approx(executed - causal, rel=1e-12)


def test_a_llama_takes_six_flops_a_weight_and_token():
    arch = dataclasses.replace(PRESETS["small"], num_layers=32)
    weights = arch.num_parameters  # tied: the embedding is the head
    assert flops_per_token(arch, {1: 1.0}) == pytest.approx(6.0 * weights, rel=2e-3)


def test_an_unknown_device_has_no_peak_and_so_no_mfu(monkeypatch):
    name = "NVIDIA H100 PCIe"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda", 0)
    assert peak_flops(cuda, "bf16") == 756e12
    assert peak_flops(cuda, "fp32") is None and peak_flops(torch.device("cpu"), "bf16") is None
    name = "GeForce 256"
    assert peak_flops(cuda, "bf16") is None
