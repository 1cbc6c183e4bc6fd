"""README.md of an exported model: what was trained, on what, and what it gained and lost, in the run's own figures."""

import json
from typing import Any

from megatron_mixcpt import __version__
from megatron_mixcpt.model.adapter_layout import describe_adapter
from megatron_mixcpt.model.origin import Origin


def model_card(origin: Origin) -> str:
    """Markdown with the front matter that model hubs read."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [mix-cpt]", "---", ""]
    arch = origin.arch
    lines += [
        f"# {_title(origin)}",
        "",
        f"A {arch.model_type} of {arch.num_parameters / 1e6:,.0f}M parameters ({arch.num_layers} layers, hidden "
        f"{arch.hidden_size}), exported by Megatron-MixCPT {__version__} from step {origin.info['step']}.",
        "",
    ]
    if origin.config:
        lines += _training(origin) + _sources(origin) + _measured(origin)
    else:
        lines += [f"Converted from `{origin.info['source']['hf']}` without training.", ""]
    return "\n".join(lines)


def _title(origin: Origin) -> str:
    return origin.run_dir.resolve().name if origin.run_dir else origin.checkpoint.resolve().name


def _training(origin: Origin) -> list[str]:
    config = origin.config
    train, loss = config["train"], config["loss"]
    base = origin.base or f"a random initialisation (preset {config['model']['preset']})"
    answers = config.get("teacher", {})
    teacher = "the base model" if answers.get("source") == "adapter_off" else "the frozen starting weights"
    if answers.get("hf"):
        teacher = f"`{answers['hf']}`"
    align = config.get("align") or {}
    if align.get("method") == "dpo":
        objective = f"DPO (`{align['loss']}`, beta {align['beta']}) on preference pairs, against the starting weights"
    elif loss["target"] == "none":
        objective = "cross-entropy alone"
    else:
        objective = (
            f"{loss['ce_weight']} x cross-entropy + {loss['kd_weight']} x KL to {teacher} with "
            f"target `{loss['target']}`, temperature {loss['temperature']}"
        )
    return [
        "## Training",
        "",
        f"- started from: {base}",
        f"- objective: {objective}",
        *([f"- trained: {describe_adapter(origin.arch, origin.adapter)}"] if origin.adapter else []),
        f"- {origin.info['step']} of {train['steps']} steps of {train['global_batch_size']} sequences, "
        f"learning rate {train['lr']} ({train['schedule']}), {train['dtype']}, seed {train['seed']}",
        "",
    ]


def _sources(origin: Origin) -> list[str]:
    if not origin.mix:
        return []
    tokens = origin.info.get("tokens_by_source", {})
    rows = [
        f"| {source['name']} | {source['kind']} | {source['weight']:.1%} | {tokens.get(source['name'], 0):,} |"
        for source in origin.mix["sources"]
    ]
    return [
        "## Data",
        "",
        f"Mixture `{origin.mix['fingerprint']}`, sequences of {origin.mix['seq_length']} tokens.",
        "",
        "| source | kind | share of tokens | target tokens trained on |",
        "| --- | --- | ---: | ---: |",
        *rows,
        "",
    ]


def validation_history(origin: Origin) -> list[dict[str, Any]]:
    """Rows of the run's metrics.jsonl that hold a validation, oldest first, up to the exported step."""
    path = origin.run_dir / "metrics.jsonl" if origin.run_dir else None
    if path is None or not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a run that was killed while writing it
        if row["step"] <= origin.info["step"] and any(key.startswith("val/") for key in row):
            rows.append(row)
    return rows


def _measured(origin: Origin) -> list[str]:
    history = validation_history(origin)
    if len(history) < 2:
        return []
    first, last = history[0], history[-1]
    kinds = {source["name"]: source["kind"] for source in origin.mix.get("sources", [])}
    rows = []
    for key in sorted(key for key in last if key.startswith("val/") and key.endswith("/ppl") and key in first):
        name = key.removeprefix("val/").removesuffix("/ppl")
        before, after = first[key], last[key]
        rows.append(f"| {name} | {kinds.get(name, '')} | {before:.3f} | {after:.3f} | {after / before - 1:+.1%} |")
    return [
        "## Gain and loss",
        "",
        f"Perplexity of held-out text, at step {first['step']} and at step {last['step']}; lower is better.",
        "",
        "| source | kind | before | after | change |",
        "| --- | --- | ---: | ---: | ---: |",
        *rows,
        "",
    ]
