"""The names of all metrics, one list for metrics.jsonl, wandb and the documentation (docs/observability.md).

`<source>` stands for the name of a source of the mixture, `<kind>` for a kind of data, `<layer>` for the number of
a layer, from 0.
"""

from __future__ import annotations

import re

RESULT = "result: "  # how the last of `forget/decision` begins
METRICS = {
    "train/tokens": "target tokens learned from so far; the x-axis of every curve in wandb",
    "train/loss": "what is minimised: mean over the step's target tokens (preference pairs in DPO)",
    "train/ce": "cross-entropy in nats a target token, unweighted",
    "train/kd": "divergence from the (swapped) teacher in nats a target token, unweighted",
    "train/ce/<source>": "cross-entropy of one source's target tokens; absent in a step without any",
    "train/swap_rate": "share of target tokens where the teacher's first choice is not the gold token",
    "train/kl_base": "KL(base || student) at temperature 1 in nats a target token, where there is a teacher; on the "
    "domain's tokens it predicts forgetting (arXiv 2509.04259)",
    "train/kl_base/<kind>": "the same over the tokens of one kind of data",
    "train/kl_base/source/<source>": "the same over the tokens of one source",
    "mix/share/<source>": "share of a source in the target tokens so far",
    "mix/tokens/<source>": "target tokens of a source so far",
    "optim/lr": "learning rate of the step",
    "optim/grad_norm": "global gradient norm before clipping; null where it was not finite",
    "optim/skipped": "steps so far that changed no weight: not finite, or a spike",
    "speed/tok_per_s_gpu": "tokens a second and rank, padding and masked tokens included",
    "speed/step_seconds": "seconds from step to step, without saving and validation",
    "speed/mfu": "model FLOPs against the device's bf16 peak; absent in DPO and where the peak is not known",
    "speed/data_pct": "percent of the step spent waiting for data",
    "mem/peak_gib": "most memory rank 0 has held: of its device, or on CPU its resident set",
    "time/data": "waiting for the loader and copying the batch to the device",
    "time/teacher": "the teacher's forward pass, or reading its cache",
    "time/forward": "the student's forward pass, tensor-parallel communication included",
    "time/loss": "the objective, from logits to loss; where it computes its gradient in forward, that too",
    "time/backward": "backward, recomputation and tensor-parallel communication included",
    "time/communication": "pipeline sends and receives, gradient reduction, agreement of the ranks",
    "time/optimizer": "gradient norm, clipping and update",
    "time/checkpoint": "how long training stood still for a checkpoint",
    "time/validation": "validation",
    "time/other": "everything else since the row before",
    "ckpt/seconds": "from the beginning of a save to its end",
    "ckpt/blocked_seconds": "of these, how long training stood still",
    "ckpt/failed": "1 where a save failed and training went on",
    "run/resumed": "1 at the step that a restart went on from",
    "val/<source>/loss": "cross-entropy in nats on the source's held-out sequences; DPO: its loss on held-out pairs",
    "val/<source>/ppl": "exp of it",
    "forget/<source>/delta": "val/<source>/loss minus its value before training: below 0 learned, above 0 forgotten",
    "forget/budget": "what `forget.budget` allows, in nats a token",
    "forget/forgotten": "the largest forget/<source>/delta of `forget.on`, measured: what the budget is for",
    "forget/noise": "its standard error, of the same held-out sequences before and now",
    "forget/expected": "what a measurement would find now, by how far train/kl_base has moved since the last one",
    "forget/decision": "what was decided and why, or what the result is, in words",
    "forget/gain": "fall of the held-out loss of what is to be learned, in nats a token",
    "forget/kd_weight": "distillation weight that the budget asks for, in place of loss.kd_weight",
    "forget/lr_factor": "what the budget multiplies the learning rate by; 1 unless the weight alone does not keep it",
    "moe/balance": "mixture of experts: sum over experts of load, in equal shares, times mean probability, mean over "
    "layers; 1 where all are in equal use",
    "moe/z": "mean square of the routers' log-sum-exp, mean over layers",
    "moe/load_max": "largest load of an expert, in equal shares",
    "moe/load_max/<layer>": "the same in one layer",
    "moe/load_min/<layer>": "smallest load of an expert of one layer, in equal shares",
    "moe/changed": "share of the choices of experts that the base model, where it is the teacher in memory, does not "
    "make for the same tokens, mean over layers",
    "moe/changed/<layer>": "the same in one layer",
    "moe/idle": "share of the experts that no token of the step went through",
    "data/pairs": "DPO: preference pairs in the step",
    "rewards/chosen": "DPO: beta times the log-ratio to the reference of the chosen answers, mean over pairs",
    "rewards/rejected": "DPO: the same of the rejected answers",
    "rewards/margin": "DPO: chosen minus rejected",
    "rewards/accuracy": "DPO: share of pairs whose chosen answer has the higher reward, a tie counting half",
    "rewards/accuracy/<source>": "DPO: the same for the pairs of one source",
    "rewards/kl": "DPO: mean log-ratio to the reference a token of both answers",
    "logps/chosen": "DPO: mean log-probability of a token of the chosen answers",
    "logps/rejected": "DPO: the same of the rejected answers",
    "val/<source>/accuracy": "DPO: rewards/accuracy on held-out pairs",
    "val/<source>/margin": "DPO: rewards/margin on held-out pairs",
    "data/stream": "chained hash of all samples so far: equal streams, equal data in equal order",
}

_PATTERNS = [re.compile(re.sub("<source>|<kind>|<layer>", "[^/]+", re.escape(name)) + r"\Z") for name in METRICS]


def documented(name: str) -> bool:
    """Whether `name` is one of METRICS."""
    return any(pattern.match(name) for pattern in _PATTERNS)


def table() -> str:
    """METRICS as a Markdown table."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in METRICS.items()]
    return "\n".join(["| name | meaning |", "|---|---|", *rows])
