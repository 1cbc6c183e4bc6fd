"""The configuration files that the demo writes and then runs, commented for the reader."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_mixcpt.demo.settings import Settings
from megatron_mixcpt.evaluate.prompts import ANSWER_PREFIX, QUESTION_PREFIX

DRAWN = "drawn"  # in the folder of the arm `recall`: what the model wrote


def preprocess_yaml(settings: Settings, arm: str, texts: Path, tokenizer: Path, out: Path) -> str:
    """`mixcpt preprocess` for `arm`: `cpt` is the domain, `mixcpt` the mixture, `pretrain` (tiny) general text.

    `recall` is the mixture with what the model wrote itself; `texts` then holds that beside the domain's documents.
    """
    head = f"""\
# Made by the demo. Run it by hand with: mixcpt preprocess <this file>
tokenizer: {_quoted(tokenizer)}
out: {_quoted(out)}
seq_length: {settings.seq_length}     # tokens in a packed sequence; documents never see each other
valid_fraction: 0    # nothing is split off: the demo measures on texts of its own
seed: {settings.seed}
sources:
"""
    domain = _documents("facts", texts / "domain.jsonl", 1.0 if arm == "cpt" else settings.domain_weight)
    if arm == "cpt":
        return head + domain
    mixture = ""
    if arm == "pretrain":
        mixture += "# Everything general that the model will ever know, before it meets the domain.\n"
        mixture += _documents("scenes", texts / "pretrain.jsonl", 0.7)
        weights = (0.2, 0.1)
    elif arm == "recall":
        mixture += "# Mix-CPT with nobody's old data: documents, and what the model itself remembers (mixcpt recall).\n"
        mixture += domain
        drawn = out.parent / DRAWN
        return (
            head
            + mixture
            + _questions(drawn, "instructions", "instruction", settings.instruction_weight)
            + _documents("remembered", drawn / "text.jsonl", settings.preference_weight, kind="general")
        )
    else:
        mixture += "# Mix-CPT: domain documents, general instructions and preferences in one stream of plain text.\n"
        mixture += domain
        weights = (settings.instruction_weight, settings.preference_weight)
    return (
        head
        + mixture
        + _questions(texts, "instructions", "instruction", weights[0])
        + _questions(texts, "preferences", "preference", weights[1])
    )


def _quoted(path: Path) -> str:
    """`path` as a YAML string: JSON's strings are YAML's."""
    return json.dumps(str(path))


def _documents(name: str, path: Path, weight: float, kind: str = "domain") -> str:
    return f"""\
- name: {name}
  kind: {kind}
  paths: [{_quoted(path)}]
  text: "{{text}}"
  weight: {weight}
"""


def _questions(texts: Path, name: str, kind: str, weight: float) -> str:
    prompt = f"{QUESTION_PREFIX}{{{'instruction' if kind == 'instruction' else 'prompt'}}}{ANSWER_PREFIX}"
    if kind == "instruction":
        answer = '  response: " {response}"\n'
    else:
        answer = '  chosen: " {chosen}"        # the chosen answer is trained on, the rejected one is not\n'
        answer += '  rejected: " {rejected}"\n'
    return f"""\
- name: {name}
  kind: {kind}
  paths: [{_quoted(texts / f"{name}.jsonl")}]
  prompt: {json.dumps(prompt)}
{answer}  separator: ""
  weight: {weight}
"""


def train_yaml(settings: Settings, arm: str, base: Path, mix: Path, run_dir: Path) -> str:
    """`mixcpt train` for `arm`. `cpt` and `mixcpt` differ in the data and in the loss, in nothing else."""
    pretrain = arm == "pretrain"
    distil = arm in ("mixcpt", "recall")
    steps = settings.pretrain_steps if pretrain else settings.steps
    batch = settings.pretrain_global_batch_size if pretrain else settings.global_batch_size
    model = "{preset: tiny}       # random weights" if pretrain else f"{{hf: {_quoted(base)}}}"
    loss = (
        "{target: swap, ce_weight: 1.0, kd_weight: 1.0, temperature: 1.0, normalize: true}  # LSSD beside cross-entropy"
        if distil
        else "{target: none}         # cross-entropy only"
    )
    return f"""\
# Made by the demo. Run it by hand with: mixcpt train <this file>{_nproc(settings)}
model: {model}
data: {{mix: {_quoted(mix)}, seq_length: {settings.seq_length}}}
parallel: {{tensor: {settings.tensor}, pipeline: 1, sequence: false}}
train:
  steps: {steps}
  micro_batch_size: {settings.micro_batch_size}
  global_batch_size: {batch}       # x {settings.seq_length} tokens a step
  lr: {settings.pretrain_lr if pretrain else settings.lr}
  warmup_steps: {settings.warmup_steps}
  schedule: cosine
  weight_decay: 0.0
  seed: {settings.seed}
  dtype: fp32
loss: {loss}
teacher: {{source: {"initial" if distil else "none"}}}
checkpoint: {{every: 0, keep: 1}}    # one at the end, and one when it is stopped
run_dir: {_quoted(run_dir)}
"""


def recall_yaml(settings: Settings, base: Path, out: Path) -> str:
    """`mixcpt recall`: instructions with answers, and texts, that the base model writes from nothing."""
    return f"""\
# Made by the demo. Run it by hand with: mixcpt recall <this file> --nproc 2
model: {{hf: {_quoted(base)}}}
out: {_quoted(out)}
n: {{instructions: {settings.recall_instructions}, text: {settings.recall_texts}}}
engine: {{transformers: {{dtype: fp32, batch_size: 16, block_size: 16}}}}
text: {{start_token: "<|endoftext|>"}}   # SmolLM2's bos begins a turn of a conversation
sampling:
  temperatures: [0.7]
  max_instruction_tokens: 64
  max_answer_tokens: 160      # with its instruction it must fit into {settings.seq_length} tokens
  max_text_tokens: 128
  seed: {settings.seed}
"""


def select_yaml(settings: Settings, run_dir: Path, mix: Path, out: Path) -> str:
    """`mixcpt select` of the alignment stage: easy samples of the mixture, under the model that was trained on it."""
    return f"""\
# Made by the demo. Run it by hand with: mixcpt select <this file>{_nproc(settings)}
model: {{checkpoint: {_quoted(run_dir)}}}
data: {{mix: {_quoted(mix)}}}
parallel: {{tensor: {settings.tensor}}}
select:
  by: ppl_low          # lowest perplexity of the response after the plain prompt
  n: {settings.select_instructions}                # instructions, for supervised fine-tuning
  pairs: {settings.select_pairs}            # preference pairs, for DPO
  format: plain        # questions are put as plain text here; `chat` takes the tokenizer's template
  valid_fraction: 0.0
  micro_batch_tokens: 1024
  dtype: fp32
  seed: {settings.seed}
out: {_quoted(out)}
"""


def align_yaml(settings: Settings, method: str, start: Path, mix: Path, run_dir: Path) -> str:
    """`mixcpt align` with `method` sft or dpo, from the run `start`."""
    dpo = method == "dpo"
    align = (
        "{method: dpo, beta: 0.1}     # the reference is the model that this starts from" if dpo else "{method: sft}"
    )
    rows = settings.global_batch_size // 2 if dpo else settings.global_batch_size  # rows of pairs are twice as long
    return f"""\
# Made by the demo. Run it by hand with: mixcpt align <this file>{_nproc(settings)}
model: {{checkpoint: {_quoted(start)}}}
data: {{mix: {_quoted(mix)}}}
parallel: {{tensor: {settings.tensor}}}
train:
  steps: {settings.dpo_steps if dpo else settings.sft_steps}
  micro_batch_size: {max(1, settings.micro_batch_size // 2) if dpo else settings.micro_batch_size}
  global_batch_size: {rows}
  lr: {settings.dpo_lr if dpo else settings.sft_lr}
  warmup_steps: 1
  schedule: cosine
  weight_decay: 0.0
  seed: {settings.seed}
  dtype: fp32
align: {align}
checkpoint: {{every: 0, keep: 1}}
run_dir: {_quoted(run_dir)}
"""


def _nproc(settings: Settings) -> str:
    return f" --nproc {settings.tensor}" * (settings.tensor > 1)
