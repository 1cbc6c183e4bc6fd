"""README.md of an exported model: what was trained, on what, and what it gained and lost, in the run's own figures."""

import json
import re
from collections.abc import Sequence
from typing import Any

from megatron_mixcpt import __version__
from megatron_mixcpt.adapters.layout import describe_adapter
from megatron_mixcpt.checkpoint.origin import Origin
from megatron_mixcpt.checkpoint.store import result_described, result_of
from megatron_mixcpt.config import Config
from megatron_mixcpt.config.history import told
from megatron_mixcpt.convert.certificate import read_certificate, recorded_versions


def model_card(origin: Origin) -> str:
    """Markdown with the front matter that model hubs read."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [mix-cpt]", "---", ""]
    arch = origin.arch
    active = f"{_millions(arch.num_active_parameters)} of them active, " if arch.num_experts else ""
    lines += [
        f"# {_title(origin)}",
        "",
        f"A {arch.model_type} of {_millions(arch.num_parameters)} parameters ({active}{arch.num_layers} layers, hidden "
        f"{arch.hidden_size}), exported by Megatron-MixCPT {__version__} from step {origin.info.step}.",
        "",
    ]
    if origin.config is not None:
        lines += (
            _training(origin, origin.config)
            + _certified(origin, origin.config)
            + _sources(origin)
            + _measured(origin, origin.config)
        )
    else:
        lines += [f"Converted from `{origin.info.source}` without training.", ""]
    return "\n".join(lines)


def _millions(count: int) -> str:
    millions = count / 1e6
    return f"{millions:,.0f}M" if millions >= 10 else f"{millions:.2g}M"


def _title(origin: Origin) -> str:
    return origin.run_dir.resolve().name if origin.run_dir else origin.checkpoint.resolve().name


def _training(origin: Origin, config: Config) -> list[str]:
    train, loss = config.train, config.loss
    base = origin.base or f"a random initialisation (preset {config.model.preset})"
    teacher = "the base model" if config.teacher.source == "adapter_off" else "the frozen starting weights"
    if config.teacher.hf:
        teacher = f"`{config.teacher.hf}`"
    align = config.align
    if align is not None and align.method == "dpo":
        objective = f"DPO (`{align.loss}`, beta {align.beta}) on preference pairs, against the starting weights"
    elif loss.target == "none":
        objective = "cross-entropy alone"
    else:
        objective = (
            f"{loss.ce_weight} x cross-entropy + {loss.kd_weight} x KL to {teacher} with "
            f"target `{loss.target}`, temperature {loss.temperature}"
        )
    if align is None or align.method != "dpo":
        factors = (f"{kind}: cross-entropy x {w.ce:g}, KL x {w.kd:g}" for kind, w in loss.by_kind.items())
        objective = "; ".join([objective, *factors])
    return [
        "## Training",
        "",
        f"- started from: {base}",
        f"- objective: {objective}",
        *([f"- trained: {describe_adapter(origin.arch, origin.adapter)}"] if origin.adapter else []),
        f"- {origin.info.step} of {train.steps} steps of {train.global_batch_size} sequences, "
        f"learning rate {train.lr} ({train.schedule}), {train.dtype}, seed {train.seed}",
        *_budget(origin, config),
        *(f"- {change}" for change in (told(origin.run_dir) if origin.run_dir else [])),
        "",
    ]


def _result(origin: Origin) -> dict[str, Any]:
    """What is known of the checkpoint where a forgetting budget chose it; empty where not."""
    parent = origin.run_dir / "checkpoints" if origin.run_dir else None
    chosen = result_of(parent) if parent else None
    if parent is None or chosen is None or chosen.resolve() != origin.checkpoint.resolve():
        return {}
    return result_described(parent)


def _budget(origin: Origin, config: Config) -> list[str]:
    if config.forget is None:
        return []
    on = ", ".join(config.forget.on) or "all held-out text but the domain's"
    lines = [
        f"- forgetting budget: {config.forget.budget:g} nats a token on {on}; the weight of KL and the learning rate "
        "followed it"
    ]
    result = _result(origin)
    if "alpha" in result:
        share = result["alpha"]
        lines.append(f"- averaged: {share:g} x step {origin.info.step} + {1 - share:g} x the starting weights")
    if "forgotten" in result:
        lines.append(f"- measured: {result['forgotten']:.4f} nats a token forgotten, {result['gain']:.4f} learned")
    return lines


def _certified(origin: Origin, config: Config) -> list[str]:
    """What `mixcpt certify` found, where it was for this run: its grid, settings and versions."""
    training = origin.info.training
    if origin.run_dir is None or training is None:
        return []
    certificate, versions = read_certificate(origin.run_dir), recorded_versions(origin.run_dir)
    ranks = training.layout["world_size"]
    if certificate is None or not certificate.speaks_for(config, origin.arch, ranks, versions):
        return []
    grid = " x ".join(f"{name} {size}" for name, size in certificate.grid.items())
    programs = ", ".join(f"{name} {version}" for name, version in certificate.versions.items())
    return [
        "## Certified",
        "",
        "`mixcpt certify` held what the trainer computes in this run's settings against an oracle in fp64, with a "
        f"small model of the same family: {certificate.compared} comparisons of losses, gradients, norms and weights "
        f"within their bounds ({grid}, for {ranks} ranks; {certificate.device}; {programs}).",
        *(f"Not part of it: {line}." for line in certificate.left_out),
        "",
    ]


def _sources(origin: Origin) -> list[str]:
    if not origin.mix:
        return []
    tokens = origin.info.training.tokens_by_source if origin.info.training else {}
    chosen = origin.config.data.weights if origin.config else {}
    weights = chosen or {source.name: source.weight for source in origin.mix.train_sources}
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    rows = [
        f"| {source.name} | {source.kind} | {shares.get(source.name, 0.0):.1%} | {tokens.get(source.name, 0):,} |"
        for source in origin.mix.sources
    ]
    return [
        "## Data",
        "",
        f"Mixture `{origin.mix.fingerprint}`, sequences of {origin.mix.seq_length} tokens.",
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
        if row["step"] <= origin.info.step and any(key.startswith("val/") for key in row):
            rows.append(row)
    return rows


def not_measured(sources: Sequence[str]) -> list[str]:
    """A paragraph that names the sources that a table of validation leaves out."""
    return [f"Not measured: {', '.join(sources)} (no validation split with target tokens).", ""] if sources else []


def _measured(origin: Origin, config: Config) -> list[str]:
    if "alpha" in _result(origin):
        return []  # the run's validations are of the weights before they were averaged
    pairs = config.kind == "dpo"
    metric, table = ("accuracy", _pair_table) if pairs else ("ppl", _perplexity_table)
    history = validation_history(origin)
    first, last = (history[0], history[-1]) if len(history) > 1 else ({}, {})
    found = re.compile(rf"val/(.+)/{metric}")
    names = sorted(
        match[1] for key in last if None not in (first.get(key), last[key]) and (match := found.fullmatch(key))
    )
    splits = _validation_splits(origin, config)
    # Without any validation, only what could not be measured is told.
    missing = [name for name in splits if name not in names] if names or not any(splits.values()) else []
    kinds = {source.name: source.kind for source in origin.mix.sources} if origin.mix else {}
    lines = table(first, last, {name: kinds.get(name, "") for name in names}) if names else []
    lines += not_measured(missing)
    return ["## Gain and loss", "", *lines] if lines else []


def _validation_splits(origin: Origin, config: Config) -> dict[str, bool]:
    """Sources that the run trained on or that are only held out -> whether they have a validation split."""
    weights = config.data.weights or {}
    found = {}
    for source in origin.mix.sources if origin.mix else ():
        train, valid = source.pairs if config.kind == "dpo" else (source.train, source.valid)
        if weights.get(source.name, source.weight) > 0 if train else valid:
            found[source.name] = valid is not None
    return found


def _perplexity_table(first: dict[str, Any], last: dict[str, Any], kinds: dict[str, str]) -> list[str]:
    rows = []
    for name, kind in kinds.items():
        before, after = first[f"val/{name}/ppl"], last[f"val/{name}/ppl"]
        rows.append(f"| {name} | {kind} | {before:.3f} | {after:.3f} | {after / before - 1:+.1%} |")
    return [
        f"Perplexity of held-out text, at step {first['step']} and at step {last['step']}; lower is better.",
        "",
        "| source | kind | before | after | change |",
        "| --- | --- | ---: | ---: | ---: |",
        *rows,
        "",
    ]


def _pair_table(first: dict[str, Any], last: dict[str, Any], kinds: dict[str, str]) -> list[str]:
    rows = []
    for name in kinds:
        accuracy, margin = ([row[f"val/{name}/{metric}"] for row in (first, last)] for metric in ("accuracy", "margin"))
        rows.append(f"| {name} | {accuracy[0]:.1%} | {accuracy[1]:.1%} | {margin[0]:+.4f} | {margin[1]:+.4f} |")
    return [
        f"Held-out preference pairs, at step {first['step']} and at step {last['step']}. Accuracy: share of pairs "
        "whose chosen answer has the higher reward, a tie counting half. Margin: mean reward of the chosen answer "
        "minus that of the rejected one.",
        "",
        "| source | accuracy before | after | margin before | after |",
        "| --- | ---: | ---: | ---: | ---: |",
        *rows,
        "",
    ]
