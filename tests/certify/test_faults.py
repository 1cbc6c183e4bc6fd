"""A certificate that cannot fail is worth nothing: every planted mistake is caught, and traced to what brings it in."""

import dataclasses

import pytest

from megatron_mixcpt.architecture.architecture import RopeScaling
from megatron_mixcpt.certify.axes import DATA, ONE, blamed, variants, whole_run
from megatron_mixcpt.certify.trial import judged
from tests.helpers.certifying import ARCH, EXPERTS, computed, posed
from tests.helpers.corpus import add_pairs, write_mix

pytestmark = pytest.mark.slow

ANYWHERE = "there in one process too"  # no matter of the layout
MISTRAL = dataclasses.replace(ARCH, model_type="mistral", qkv_bias=False, sliding_window=16)
TIED = dataclasses.replace(
    ARCH,
    model_type="llama",
    qkv_bias=False,
    tie_word_embeddings=True,
    rope_scaling=RopeScaling("llama3", 8.0, original_max_position_embeddings=64),
)
ON_EXPERTS = ["gate_proj", "up_proj", "down_proj"]
ROUTED = {"router": "trained", "router_balance": 0.1, "router_z": 0.01}
SMALL = {"train": {"micro_batch_size": 1, "global_batch_size": 4}}
BF16 = {"train": {**SMALL["train"], "dtype": "bf16"}}
# Of each problem its settings, and the words that each mistake is traced with.
PROBLEMS = {
    "tensor": (
        {"arch": ARCH, "parallel": {"tensor": 2, "sequence": True}, **SMALL},
        {
            "the loss is all reduced under autograd": "with parallel.tensor",
            "the distillation gradient is multiplied by the tensor size": "with parallel.tensor and the teacher",
            "gradients of norms are not summed over the sequence": "with parallel.sequence",
            "padding counts in the softmax": ANYWHERE,
            "of tied tokens the last rank s is swapped": "with parallel.tensor and the teacher",
            "labels of other ranks are one token off": "with parallel.tensor",
            "the gradient norm is that of one rank": "with parallel.tensor",
            "a document sees its neighbour": ANYWHERE,
            "prompts are trained on": ANYWHERE,
            "the teacher is shifted by a token": "with the teacher",
            "rotary angles are of another base": ANYWHERE,
            "norms and biases are decayed": ANYWHERE,
            "the learning rate is that of the next step": ANYWHERE,
        },
    ),
    "pipeline": (
        {"arch": TIED, "parallel": {"pipeline": 2}, "train": {"micro_batch_size": 1, "global_batch_size": 2}},
        {
            "the layers of two stages are exchanged": "with parallel.pipeline",
            "gradients of tied embeddings are not summed over the stages": "with parallel.pipeline",
            "the pipelined teacher answers for the next micro batch": "with parallel.pipeline and the teacher",
            "every micro batch weighs the same": ANYWHERE,
        },
    ),
    "context": (
        {"arch": MISTRAL, "parallel": {"context": 2}, "train": {**SMALL["train"], "recompute": "attention"}},
        {
            "gradients of keys and values are not summed over the ranks": "with parallel.context",
            "every part of a row counts its positions from 0": "with parallel.context",
            "what is recomputed passes half of its gradient": "with train.recompute",
        },
    ),
    "data": (
        {"data": 2, "train": {**SMALL["train"], "distributed_optimizer": True}},
        {
            "gradients are averaged over the ranks": f"with {DATA}",
            "the mean is one of the ranks means": f"with {DATA}",
            "all replicas read the same rows": f"with {DATA}",
            "shards of updated weights are not gathered": f"with train.distributed_optimizer and {DATA}",
        },
    ),
    "kept": (
        {
            "parallel": {"tensor": 2},
            "teacher": {"source": "cached", "cache": "cache"},
            "forget": {"budget": 0.1},
            **SMALL,
        },
        {
            "kept answers are of the next token": "with the teacher",
            "the budget s distillation weight never takes hold": "with forget",
        },
    ),
    "precision": (BF16, {"master weights never reach the model": ANYWHERE}),
    "adapter": (
        {
            "parallel": {"tensor": 2},
            "adapter": {"method": "lora", "rank": 4},
            "teacher": {"source": "adapter_off"},
            **SMALL,
        },
        {
            "the adapter s scale grows with the tensor ranks": "with parallel.tensor and adapter",
            "the adapter s values are not summed over the tensor ranks": "with parallel.tensor and adapter",
            "the adapters stay on in the teacher": "with adapter and the teacher",
        },
    ),
    "preferences": (
        {
            "parallel": {"context": 2},
            "loss": {"target": "none", "by_kind": {}},
            "align": {"method": "dpo", "beta": 0.3},
            **SMALL,
        },
        {
            "chosen and rejected are exchanged": ANYWHERE,
            "the mean is over rows in place of pairs": ANYWHERE,
            "an answer is the part of it that a rank has": "with parallel.context",
        },
    ),
    "experts": (
        {
            "arch": EXPERTS,
            "data": 2,
            "parallel": {"expert": 2},
            "loss": {"target": "none"},
            "train": {"micro_batch_size": 1, "global_batch_size": 2, **ROUTED},
        },
        {
            "gradients of experts are averaged over the ranks that have others": "with parallel.expert",
            "tokens come back in the order of their experts": "with parallel.expert",
            "the experts of two ranks are exchanged": "with parallel.expert",
            "shares of a token do not add up to 1": ANYWHERE,
            "an expert that is full drops tokens": ANYWHERE,
        },
    ),
    "routers": (
        {
            "arch": EXPERTS,
            "parallel": {"tensor": 2, "sequence": True},
            "loss": {"target": "none"},
            "train": {"micro_batch_size": 1, "global_batch_size": 2, **ROUTED},
        },
        {
            "gradients of routers are not summed over the sequence": "with parallel.sequence",
            "the balance is that of a rank s part of the sequence": "with parallel.sequence",
            "gradients of what experts take are not summed over the tensor ranks": "with parallel.sequence",
        },
    ),
    "adapters on experts in parts": (
        {
            "arch": EXPERTS,
            "parallel": {"tensor": 2, "sequence": True},
            "adapter": {"method": "lora", "rank": 4, "targets": ON_EXPERTS},
            "loss": {"target": "none"},
            "train": {"micro_batch_size": 1, "global_batch_size": 2},
        },
        {
            "the scale of an expert s adapter grows with the tensor ranks": "with parallel.tensor and adapter",
            "gradients of whole matrices beside an expert s part are not summed": "with parallel.tensor and adapter",
            "an expert takes the adapter of the one after it": "with adapter",
        },
    ),
    "adapters on experts over ranks": (
        {
            "arch": EXPERTS,
            "data": 2,
            "parallel": {"expert": 2},
            "adapter": {"method": "lora", "rank": 4, "targets": ON_EXPERTS},
            "teacher": {"source": "adapter_off"},
            "train": {"micro_batch_size": 1, "global_batch_size": 2},
        },
        {
            "the adapters of two ranks experts are exchanged": "with parallel.expert and adapter",
            "gradients of adapters are summed over ranks that have other experts": "with parallel.expert and adapter",
            "the adapters of experts stay on in the teacher": "with adapter and the teacher",
        },
    ),
}
PLANTED = [(problem, fault) for problem, (_, faults) in PROBLEMS.items() for fault in faults]


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    path = write_mix(tmp_path_factory.mktemp("certify") / "data", seq_length=64, train=12)
    preferences = path.with_name("preferences.json")
    preferences.write_text(path.read_text())
    add_pairs(preferences)
    return path, preferences


@pytest.fixture(scope="module")
def runs(tmp_path_factory, mix):
    """`runs(problem)[fault]`: the problem as its ranks computed it with the fault."""
    known = {}

    def of(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            sections, faults = PROBLEMS[name]
            problem = posed(folder / "posed", mix[name == "preferences"], **sections)
            known[name] = computed(problem, list(faults), folder / "faults", chosen(faults))
        return known[name]

    return of


def chosen(faults):
    """Of what is no matter of the layout it is enough, here, to switch all of it off; of what is, each axis."""

    def choose(fault, others):
        return others[-1:] if faults[fault] == ANYWHERE else [other for other in others if other.name != ONE]

    return choose


def test_there_are_many():
    assert len(PLANTED) >= 20


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "fault"), PLANTED, ids=[fault for _, fault in PLANTED])
def test_a_planted_mistake_is_caught_and_traced(runs, name, fault):
    problem = runs(name)[fault]
    dtype = problem.values["train"]["dtype"]
    off = [deviation for deviation in judged(problem, whole_run(problem, dtype)) if deviation.is_off]
    assert off, "nothing is off"
    others = chosen(PROBLEMS[name][1])(fault, variants(problem, dtype))
    cured = {other.name: not any(d.is_off for d in judged(problem, other)) for other in others}
    cause = blamed(cured)
    assert cause.endswith(PROBLEMS[name][1][fault]), f"{cause}; {cured}; {[d.told() for d in off[:5]]}"


def test_a_refinement_is_named_in_place_of_what_it_refines():
    assert blamed({"parallel.sequence": True, "parallel.tensor": True, "the teacher": False, ONE: True}) == (
        "it appears with parallel.sequence"
    )
    assert "each of several axes" in blamed({"parallel.tensor": False, "parallel.pipeline": False, ONE: True})
    assert "without any layout" in blamed({})
