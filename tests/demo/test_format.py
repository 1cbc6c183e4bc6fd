"""Answers of the asked form: one line, and an end of their own."""

import pytest
import torch

from megatron_mixcpt.demo.format import format_share


class Scripted:
    """A model that says what it is told to, and a tokenizer of one token a character; 0 ends a text."""

    eos_token_id = pad_token_id = 0

    def __init__(self, answers):
        self.answers = answers

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [ord(character) for character in text]}

    def generate(self, *, input_ids, max_new_tokens, **_):
        rows = []
        for row in input_ids.tolist():
            said = [ord(c) for c in self.answers["".join(map(chr, filter(None, row)))]][:max_new_tokens]
            rows.append(row + said + [0] * (max_new_tokens - len(said)))
        return torch.tensor(rows)

    def decode(self, tokens, skip_special_tokens):
        return "".join(map(chr, tokens))


def test_only_whole_single_lines_count():
    answers = {
        "good?": " Paris",
        "two lines?": "Paris\nQuestion: more",
        "never ends?": "Paris Paris Paris Paris",
        "silent?": " ",
    }
    model = Scripted(answers)
    shares = {prompt: format_share(model, model, [prompt], max_new_tokens=20) for prompt in answers}
    assert shares == {"good?": 1.0, "two lines?": 0.0, "never ends?": 0.0, "silent?": 0.0}
    progress = []
    share = format_share(model, model, list(answers), max_new_tokens=20, batch_size=3, on_progress=progress.append)
    assert share == 0.25 and progress == [0.75, 1.0]
    with pytest.raises(ValueError, match="at least one prompt"):
        format_share(model, model, [], max_new_tokens=20)
