"""Batch scripts: the files of launch/ with options and settings laid over their own."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import megatron_mixcpt
from megatron_mixcpt.errors import MixcptError

OPTION = re.compile(r"#SBATCH --([a-z-]+)(?:=.*)?")
SETTING = re.compile(r"([A-Z_]+)=\$\{\1:-.*\}(\s+#.*)?")


def template(name: str) -> str:
    """Text of a file of launch/: beside the package in a checkout, inside it when installed."""
    package = Path(megatron_mixcpt.__file__).parent
    for folder in (package / "launch", package.parent / "launch"):
        if (folder / name).is_file():
            return (folder / name).read_text()
    raise MixcptError(f"launch/{name} is missing beside {package}: install the package again")


def render(
    text: str, options: Mapping[str, str | None], settings: Mapping[str, str], arguments: Sequence[str] = ()
) -> str:
    """A script that `sbatch` takes as it is.

    Args:
        text: a template: a plain batch script.
        options: sbatch options by long name; "" for one without a value, None for one that is dropped. Those that the
            template does not have follow its own.
        settings: values of the template's `NAME=${NAME:-default}` lines, which then no longer heed the environment.
        arguments: the script's own, for when it is submitted without any.

    Raises KeyError for a setting that the template does not have.
    """
    remaining, missing = dict(options), set(settings)
    lines: list[str] = []
    last_option = 0
    for line in text.splitlines():
        if match := OPTION.fullmatch(line):
            if match[1] in remaining:
                value = remaining.pop(match[1])
                if value is None:
                    continue
                line = _option(match[1], value)
            lines.append(line)
            last_option = len(lines)
            continue
        if (match := SETTING.fullmatch(line)) and match[1] in settings:
            missing.discard(match[1])
            line = f"{match[1]}={shlex.quote(settings[match[1]])}{match[2] or ''}"
        lines.append(line)
    if missing:
        raise KeyError(f"the template has no setting {', '.join(sorted(missing))}")
    added = [_option(name, value) for name, value in remaining.items() if value is not None]
    if arguments:
        added.append(f"[ $# -gt 0 ] || set -- {shlex.join(arguments)}")
    return "\n".join([*lines[:last_option], *added, *lines[last_option:]]) + "\n"


def _option(name: str, value: str) -> str:
    quoted = f'"{value}"' if any(character.isspace() for character in value) else value
    return f"#SBATCH --{name}={quoted}" if value else f"#SBATCH --{name}"
