"""Exactly the tokens of the assistant are learned: against the assistant mask that transformers makes itself."""

import json
import shutil

import pytest

from megatron_mixcpt.data_prep.chat import ChatRenderer
from megatron_mixcpt.data_prep.config import SourceConfig, parse_config
from megatron_mixcpt.data_prep.documents import Batch
from megatron_mixcpt.data_prep.format import KIND_INSTRUCTION, ROLE_ASSISTANT, ROLE_MASK, ROLE_SHIFT, TARGET
from megatron_mixcpt.data_prep.pipeline import preprocess
from megatron_mixcpt.data_prep.template import BadRecord
from megatron_mixcpt.data_prep.tokenizer import load_tokenizer
from tests.data_prep.conftest import write_jsonl
from tests.data_prep.helpers import load_mix, source_of

# What an assistant says, with the token that ends it, stands in a generation block, for transformers to mark.
ANSWER = (
    "{% generation %}{% if message.tool_calls %}{{ message.tool_calls | tojson }}"
    "{% else %}{{ message.content | trim }}{% endif %}{{ end }}{% endgeneration %}"
)
CHATML = (
    "{% set end = '<|im_end|>' %}"
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}" + ANSWER + "{% else %}{{ message.content + end }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As ChatML, with a system turn of its own where the conversation has none.
SMOLLM2 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
LLAMA3 = (
    "{% set end = '<|eot_id|>' %}{{ bos_token }}"
    "{% if tools %}{{ '<|start_header_id|>system<|end_header_id|>\n\nTools: ' + (tools | tojson) + end }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + ('ipython' if message.role == 'tool' else message.role) + '<|end_header_id|>\n\n' }}"
    "{% if message.role == 'assistant' %}" + ANSWER + "{% else %}{{ message.content | trim + end }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "smollm2": SMOLLM2, "llama3": LLAMA3}
# Drops what earlier turns thought, as reasoning models do.
FORGETS_THOUGHTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>')[-1] }}"
    "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "dose", "arguments": {"mg": 5}}}
TOOLS = [{"type": "function", "function": {"name": "dose", "description": "the dose", "parameters": {}}}]
SYSTEM = {"role": "system", "content": "You are a doctor."}
FIRST = [
    {"role": "user", "content": "what is the liver?"},
    {"role": "assistant", "content": "an organ\n\nof the body "},
]
SECOND = [{"role": "user", "content": " and the dose? "}, {"role": "assistant", "content": "5 mg <|im_end|> of x"}]
WITH_TOOL = [
    {"role": "user", "content": "and the dose?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"mg": 5}'},
    {"role": "assistant", "content": "5 mg"},
]
CONVERSATIONS = {
    "one turn": (FIRST, None),
    "several turns": (FIRST + FIRST, None),
    "system prompt": ([SYSTEM, *FIRST, *FIRST], None),
    "tools": ([SYSTEM, *FIRST, *WITH_TOOL], TOOLS),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer_dir):
    """A tokenizer with each template and all control tokens."""
    from transformers import AutoTokenizer

    names = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    found = {}
    for name, template in {**TEMPLATES, "forgets thoughts": FORGETS_THOUGHTS}.items():
        tokenizer.chat_template = template
        tokenizer.bos_token = "<|begin_of_text|>" if name == "llama3" else "<|endoftext|>"
        found[name] = tmp_path_factory.mktemp("templates") / "tokenizer"
        tokenizer.save_pretrained(found[name])
    return found


def encoded(folder, messages, tools):
    tokenizer = load_tokenizer(folder)
    source = SourceConfig(
        name="s", kind="instruction", paths=["x"], messages="m", format="chat", loss="answer", weight=1
    )
    batch = Batch(tokenizer.joining)
    batch.add(ChatRenderer(source, tokenizer).document(messages, KIND_INSTRUCTION, tools).pieces)
    tokens, flags, _ = batch.encode(tokenizer.engine)
    return tokenizer, tokens, flags


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_targets_are_the_assistant_mask_of_transformers(folders, template, conversation):
    from transformers import AutoTokenizer

    messages, tools = CONVERSATIONS[conversation]
    _, tokens, flags = encoded(folders[template], messages, tools)
    theirs = AutoTokenizer.from_pretrained(folders[template]).apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert tokens.tolist() == theirs["input_ids"]
    assert (flags & TARGET).tolist() == theirs["assistant_masks"]
    assert sum(theirs["assistant_masks"]) > 3
    spoken = (flags & ROLE_MASK) >> ROLE_SHIFT == ROLE_ASSISTANT
    assert spoken[(flags & TARGET) != 0].all()


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_cannot_end_itself(folders, template):
    """A control string within an answer is text; the answer ends with the template's own."""
    tokenizer, tokens, flags = encoded(folders[template], SECOND, None)
    end = "<|eot_id|>" if template == "llama3" else "<|im_end|>"
    learned = tokens[(flags & TARGET) != 0].tolist()
    assert tokenizer.decode(learned) == f"5 mg <|im_end|> of x{end}"
    assert learned.count(tokenizer.control[end]) == 1 and learned[-1] == tokenizer.control[end]


def test_a_template_that_forgets_earlier_thoughts_is_refused(folders):
    thought = [FIRST[0], {"role": "assistant", "content": "<think>hm</think>an organ"}]
    tokenizer, tokens, flags = encoded(folders["forgets thoughts"], thought, None)  # nothing is rewritten yet
    assert tokenizer.decode(tokens[(flags & TARGET) != 0].tolist()) == "<think>hm</think>an organ<|im_end|>"
    with pytest.raises(BadRecord, match="rewrites earlier turns"):
        encoded(folders["forgets thoughts"], thought + SECOND, None)


def test_pairs_that_teach_nothing_are_quarantined_with_the_reason(tmp_path, folders):
    """Identical, empty and over-long answers; conversations that a template rewrites."""

    def pair(chosen, rejected, prompt="what?"):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    good = [pair(f"good {i}", f"bad {i}", f"what is {i}?") for i in range(40)]
    bad = [
        (pair("same", "same"), "no preference"),
        (pair("", "x"), "empty"),
        (pair("x", " \n"), "empty"),
        (pair("fine", "the liver " * 200), "too long"),
        (pair("the liver " * 200, "fine"), "too long"),
    ]
    path = write_jsonl(tmp_path / "pairs.jsonl", good + [record for record, _ in bad])
    turns = [*FIRST[:1], {"role": "assistant", "content": "<think>hm</think>yes"}, *SECOND[:1]]
    sides = {side: [*turns, {"role": "assistant", "content": f"{side} end"}] for side in ("chosen", "rejected")}
    rewritten = write_jsonl(tmp_path / "turns.jsonl", [sides, *({k: v[2:] for k, v in sides.items()} for _ in "ab")])
    fields = {key: "{" + key + "}" for key in ("chosen", "rejected")}
    source = {"kind": "preference", "format": "chat", "loss": "answer", "max_bad_fraction": 0.5, **fields}
    values = {
        "tokenizer": str(shutil.copytree(folders["forgets thoughts"], tmp_path / "tokenizer")),
        "out": str(tmp_path / "out"),
        "seq_length": 128,
        "valid_fraction": 0.0,
        "exact_duplicates": "keep",
        "sources": [
            {**source, "name": "pairs", "paths": [str(path)], "prompt": "{prompt}", "weight": 1},
            {**source, "name": "turns", "paths": [str(rewritten)], "weight": 1},
        ],
    }
    preprocess(parse_config(values))
    rows = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    found = {(row["source"], row["line"]): row["reason"] for row in rows}
    expected = {("pairs", 41 + i): reason for i, (_, reason) in enumerate(bad)}
    assert found == {**expected, ("turns", 1): "unstable template"}
    entry = source_of(load_mix(tmp_path / "out"), "pairs")["pairs"]["train"]
    assert entry["documents"] == 40
