"""The demo writes valid configurations of the real commands, and its arms differ only where they say."""

from pathlib import Path

import pytest

from megatron_mixcpt.config import Config, load_config
from megatron_mixcpt.data_prep.config import PreprocessConfig
from megatron_mixcpt.data_prep.template import compile_template
from megatron_mixcpt.demo.configs import preprocess_yaml, recall_yaml, train_yaml
from megatron_mixcpt.demo.settings import MODELS
from megatron_mixcpt.evaluate.prompts import plain_prompt
from megatron_mixcpt.recall.config import RecallConfig

FOLDER = Path("/a folder, with: odd {characters} 'and' \"quotes\"")
ARMS = {"smollm2": ("cpt", "mixcpt", "recall"), "tiny": ("pretrain", "cpt", "mixcpt")}
CASES = [(model, arm) for model, arms in ARMS.items() for arm in arms]


def preprocess(tmp_path, model, arm):
    path = tmp_path / "preprocess.yaml"
    path.write_text(preprocess_yaml(MODELS[model], arm, FOLDER / "texts", FOLDER / "base", FOLDER / "data"))
    return load_config(PreprocessConfig, path, literal=True)


def train(tmp_path, model, arm):
    path = tmp_path / "train.yaml"
    path.write_text(train_yaml(MODELS[model], arm, FOLDER / "base", FOLDER / "mix.json", FOLDER / "run"))
    return load_config(Config, path)


@pytest.mark.parametrize(("model", "arm"), CASES)
def test_preprocess_yaml_is_valid_and_keeps_paths_as_they_are(tmp_path, model, arm):
    config = preprocess(tmp_path, model, arm)
    assert config.out == str(FOLDER / "data") and config.seq_length == MODELS[model].seq_length
    assert all(path.startswith(str(FOLDER)) for source in config.sources for path in source.paths)
    assert sum(source.weight for source in config.sources) == pytest.approx(1.0)


def test_recall_yaml_is_valid_and_what_is_written_fits_into_a_sequence(tmp_path):
    settings, path = MODELS["smollm2"], tmp_path / "recall.yaml"
    path.write_text(recall_yaml(settings, FOLDER / "base", FOLDER / "drawn"))
    config = load_config(RecallConfig, path)
    assert config.out == str(FOLDER / "drawn") and config.model.hf == str(FOLDER / "base")
    assert config.sampling.max_instruction_tokens + config.sampling.max_answer_tokens < settings.seq_length - 16


@pytest.mark.parametrize("model", MODELS)
def test_cpt_sees_the_domain_only_and_mixcpt_all_three_kinds(tmp_path, model):
    kinds = {arm: [source.kind for source in preprocess(tmp_path, model, arm).sources] for arm in ("cpt", "mixcpt")}
    assert kinds == {"cpt": ["domain"], "mixcpt": ["domain", "instruction", "preference"]}
    if model == "tiny":
        names = [path for source in preprocess(tmp_path, model, "pretrain").sources for path in source.paths]
        assert not any("domain.jsonl" in name for name in names)


@pytest.mark.parametrize("model", MODELS)
def test_questions_are_trained_exactly_as_they_are_asked(tmp_path, model):
    instructions, preferences = preprocess(tmp_path, model, "mixcpt").sources[1:]
    prompt = compile_template(instructions.prompt)({"instruction": "Why?"})
    assert prompt + instructions.separator == plain_prompt("Why?")
    assert compile_template(preferences.prompt)({"prompt": "Why?"}) + preferences.separator == plain_prompt("Why?")
    for template in (instructions.response, preferences.chosen, preferences.rejected):
        answer = compile_template(template)({"response": "X", "chosen": "X", "rejected": "X"})
        assert answer == " X"


@pytest.mark.parametrize("model", MODELS)
def test_the_arms_differ_in_data_loss_teacher_and_run_directory_only(tmp_path, model):
    cpt, mixcpt = (train(tmp_path, model, arm).model_dump() for arm in ("cpt", "mixcpt"))
    assert {key for key in cpt if cpt[key] != mixcpt[key]} == {"loss", "teacher"}  # paths are the same in this test
    assert cpt["loss"]["target"] == "none" and mixcpt["loss"]["target"] == "swap"
    assert cpt["train"]["steps"] == MODELS[model].steps


def test_the_tiny_model_is_pretrained_without_a_teacher_from_random_weights(tmp_path):
    config = train(tmp_path, "tiny", "pretrain")
    assert config.model.preset == "tiny" and config.loss.target == "none" and config.parallel.tensor == 2


@pytest.mark.parametrize("model", MODELS)
def test_shares_of_the_mixture_sum_to_one(model):
    settings = MODELS[model]
    assert settings.domain_weight + settings.instruction_weight + settings.preference_weight == pytest.approx(1.0)
