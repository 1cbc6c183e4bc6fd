"""Batched greedy generation against one prompt at a time without a cache."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.evaluate.generate import generate_greedy, say
from megatron_mixcpt.evaluate.loading import load_directory

PROMPTS = ["The heron", "Water is shallow where the heron", "a", "Nothing moves by the river; a slow", "The"]


@torch.no_grad()
def oracle(model, tokenizer, prompt, steps, min_steps, begin=()):
    ids = list(begin) + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    new = []
    for step in range(steps):
        logits = model(torch.tensor([ids + new])).logits[0, -1]
        if step < min_steps:
            logits[tokenizer.eos_token_id] = -torch.inf
        token = int(logits.argmax())
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    lines = tokenizer.decode(new, skip_special_tokens=True).strip().splitlines()
    return lines[0].strip() if lines else ""


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("min_new_tokens", [0, 3])
def test_answers_equal_the_oracle_in_the_order_of_the_prompts(model_and_tokenizer, batch_size, min_new_tokens):
    model, tokenizer = model_and_tokenizer
    answers = generate_greedy(
        model, tokenizer, PROMPTS, max_new_tokens=8, min_new_tokens=min_new_tokens, batch_size=batch_size
    )
    assert answers == [oracle(model, tokenizer, prompt, 8, min_new_tokens) for prompt in PROMPTS]
    assert len(set(answers)) > 1


def test_a_prompt_begins_as_the_tokenizer_begins_a_text_where_that_is_asked_for(hf_dir):
    model, tokenizer = load_directory(hf_dir)
    first = tokenizer.convert_ids_to_tokens(5)
    begin = TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 5)])
    tokenizer.backend_tokenizer.post_processor = begin
    assert tokenizer("a")["input_ids"][0] == 5
    plain, begun = ([generate_greedy(model, tokenizer, [prompt], max_new_tokens=8, special_tokens=special)[0]
                     for prompt in PROMPTS] for special in (False, True))  # fmt: skip
    assert plain == [oracle(model, tokenizer, prompt, 8, 0) for prompt in PROMPTS]
    assert begun == [oracle(model, tokenizer, prompt, 8, 0, [5]) for prompt in PROMPTS] != plain


@torch.no_grad()
def test_sureness_is_the_mean_log_probability_of_the_tokens_that_were_said(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    for said, prompt in zip(say(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=3), PROMPTS):
        ids, sures = tokenizer(prompt, add_special_tokens=False)["input_ids"], []
        for _ in range(8):
            best, token = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).max(-1)
            ids, sures = [*ids, int(token)], [*sures, float(best)]
            if token == tokenizer.eos_token_id or "\n" in tokenizer.decode(ids[-len(sures) :]).lstrip():
                break
        assert said.sure == pytest.approx(sum(sures) / len(sures), abs=1e-4)


def test_a_model_that_prefers_silence_is_made_to_speak(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    hook = model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([tokenizer.eos_token_id]), 1e4)
    )
    try:
        assert generate_greedy(model, tokenizer, PROMPTS, max_new_tokens=6) == [""] * len(PROMPTS)
        spoken = generate_greedy(model, tokenizer, PROMPTS, max_new_tokens=6, min_new_tokens=3)
    finally:
        hook.remove()
    assert any(spoken)


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_directory(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="cannot open"):
        load_directory(tmp_path)
