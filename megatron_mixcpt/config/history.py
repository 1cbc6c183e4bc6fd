"""With which settings each step of a run was taken: `settings.jsonl` in the run directory.

A line a change, `{"step": N, "settings": {key: value}}`: all settings, by dotted key, of the steps after the N-th.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from megatron_mixcpt.config.reader import save_config
from megatron_mixcpt.config.schema import Config
from megatron_mixcpt.files import write_whole

FILE = "settings.jsonl"
Flat = dict[str, Any]
UNKNOWN = object()


def record_settings(run_dir: Path, step: int, config: Config) -> list[str]:
    """Keep `config` as what the run goes on with after `step` steps, in `config.yaml` and in the history. One process.

    Returns what differs from before, to be told.
    """
    now = flat(config.model_dump(mode="json", by_alias=True))
    found = read_history(run_dir)
    entries = [entry for entry in found if entry["step"] < step]
    before: Flat = entries[-1]["settings"] if entries else {}
    if before != now:
        entries.append({"step": step if entries else 0, "settings": now})
    if entries != found:  # or settings that were tried from here on, and no checkpoint has
        write_whole(run_dir / FILE, "".join(json.dumps(entry) + "\n" for entry in entries))
    save_config(config, run_dir / "config.yaml")
    return changes(before, now) if before else []


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of the history, oldest first; of a run that has none, its configuration from the first step on."""
    try:
        return [json.loads(line) for line in (run_dir / FILE).read_text().splitlines()]
    except FileNotFoundError:
        pass
    try:
        return [{"step": 0, "settings": flat(yaml.safe_load((run_dir / "config.yaml").read_text()))}]
    except (FileNotFoundError, yaml.YAMLError, AttributeError):
        return []


def told(run_dir: Path) -> list[str]:
    """Every change of a run's settings, a sentence each: `from step 41 on: train.lr 0.0001 -> 5e-05`."""
    entries = read_history(run_dir)
    changed = [(entry["step"], changes(before["settings"], entry["settings"])) for before, entry in pairwise(entries)]
    return [f"from step {step + 1} on: {', '.join(keys)}" for step, keys in changed if keys]


def changes(before: Flat, now: Flat) -> list[str]:
    """`key old -> new` of every key that differs; one that only one version of the program knows was, or is, at its
    default."""
    pairs = {key: (_value(before, key), _value(now, key)) for key in {**before, **now}}
    return [f"{key} {old} -> {new}" for key, (old, new) in pairs.items() if UNKNOWN not in (old, new) and old != new]


def _value(settings: Flat, key: str) -> Any:
    """None in a section that is empty there, UNKNOWN where there is no such key, or a section in its place."""
    if key in settings:
        return settings[key]
    above = key.split(".")
    return None if any(".".join(above[:depth]) in settings for depth in range(1, len(above))) else UNKNOWN


def flat(values: Mapping[str, Any], prefix: str = "") -> Flat:
    """Nested settings by dotted key."""
    found: Flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
