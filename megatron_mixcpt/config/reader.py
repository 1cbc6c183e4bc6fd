"""Typed configuration from files: defaults < YAML file < `key=value` on the command line.

Every command's file is read here. What is wrong is told with the line of the file, or the override, that it came from.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from megatron_mixcpt.config.section import Section
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.files import write_whole

# Keys that only one command's files have: who gives a file to another command is told which it is for.
COMMAND_OF = {
    "sources": "preprocess",
    "stages": "launch",
    "arms": "study",
    "select": "select",
    "align": "align",
    "train": "train",
}

C = TypeVar("C", bound=BaseModel)
Location = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """The plain values of a file with overrides laid over them, and where each came from."""

    name: str
    values: dict[str, Any]
    lines: dict[Location, int] = field(default_factory=dict)
    overrides: dict[Location, str] = field(default_factory=dict)

    def where(self, location: Location) -> str:
        """What errors about the value at `location` begin with."""
        known: Location = location
        while known and known not in self.overrides and known not in self.lines:
            known = known[:-1]
        if known in self.overrides:
            return f"command line, {self.overrides[known]}"
        place = f"{self.name}:{self.lines[known]}" if known in self.lines else self.name
        within = [text for key, text in self.overrides.items() if key[: len(location)] == location]
        return " with ".join([place, " ".join(within)]) if within else place


def load_config(
    schema: type[C], path: str | Path, overrides: Sequence[str] | None = None, *, literal: bool = False
) -> C:
    """Read `path`, lay `key=value` overrides over it, validate. Raises ConfigError naming file, line and key.

    Args:
        literal: take `${...}` in values as it stands, where it would name another key.
    """
    return validate_document(schema, read_document(path, overrides, literal=literal))


def read_document(path: str | Path, overrides: Sequence[str] | None = None, *, literal: bool = False) -> Document:
    """The values of `path` with overrides laid over them, not yet validated. Raises ConfigError."""
    text = _read(Path(path))
    given: dict[Location, str] = {}
    for override in overrides or []:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r}: overrides are written key=value, for example train.steps=100")
        given[tuple(key.split("."))] = override
    lines: dict[Location, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}: expected `key: value` lines, found {_described(node)}")
        _collect_lines(node, (), lines, str(path))
        text = _with_words_as_keys(text, node)
        if literal:
            values = yaml.safe_load(text)
        else:
            merged = OmegaConf.merge(OmegaConf.create(text), OmegaConf.from_dotlist(list(given.values())))
            values = OmegaConf.to_container(merged, resolve=True)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: cannot be read as YAML: {getattr(error, 'problem', None) or error}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{' '.join([str(path), *given.values()])}: {error}") from None
    return Document(str(path), cast(dict[str, Any], values), lines, given)


def validate(schema: type[C], values: Any, where: str) -> C:
    """Build `schema` from plain values that no file holds. Raises ConfigError, whose message begins with `where`."""
    return validate_document(schema, Document(where, values))


def validate_document(schema: type[C], document: Document) -> C:
    """Build `schema`; all problems are reported in one ConfigError, a line each."""
    try:
        return schema.model_validate(document.values)
    except ValidationError as error:
        for key, command in COMMAND_OF.items():
            if key in document.values and key not in schema.model_fields and (key,) not in document.overrides:
                raise ConfigError(
                    f"{document.where((key,))}: {key}: this file is for `mixcpt {command}`, another command than this"
                ) from None
        problems = [f"{document.where(problem['loc'])}: {_explain(schema, problem)}" for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from None


def rendered(config: BaseModel) -> str:
    """The resolved configuration as YAML, every default included: what `config.yaml` of a run holds."""
    return yaml.safe_dump(config.model_dump(by_alias=True), sort_keys=False)


def save_config(config: BaseModel, path: Path) -> None:
    write_whole(path, rendered(config))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: cannot be read as YAML: it is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _described(node: yaml.Node | None) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value" if node else "nothing"


def _with_words_as_keys(text: str, node: yaml.Node) -> str:
    """`text` with those keys in quotes that YAML 1.1 takes for truth values, as the `on` of `forget`."""
    keys: dict[int, yaml.Node] = {}
    nodes = [node]
    while nodes:
        inner = nodes.pop()
        if isinstance(inner, yaml.MappingNode):
            keys |= {key.start_mark.index: key for key, _ in inner.value if key.tag == "tag:yaml.org,2002:bool"}
            nodes += [value for _, value in inner.value]
        elif isinstance(inner, yaml.SequenceNode):
            nodes += inner.value
    for start, key in sorted(keys.items(), reverse=True):
        text = f'{text[:start]}"{key.value}"{text[key.end_mark.index :]}'
    return text


def _collect_lines(node: yaml.Node, location: Location, lines: dict[Location, int], path: str) -> None:
    """Record the line of every key below `node`; YAML would silently let a second `weight:` win, we do not."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise ConfigError(f"{path}:{line}: key {key.value!r} is given twice")
            seen.add(key.value)
            below = (*location, key.value)
            lines[below] = line
            _collect_lines(value, below, lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            below = (*location, index)
            lines[below] = value.start_mark.line + 1
            _collect_lines(value, below, lines, path)


def _explain(schema: type[BaseModel], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        known = _keys_of(schema, location[:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], nearest[0]])}?" if nearest else f"known: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{key}: required"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    given = problem["input"]
    return f"{key}: {problem['msg']}" + ("" if isinstance(given, dict | list) else f" (got {given!r})")


def section_of(annotation: Any) -> Any:
    """The section class of a key that may also be null; any other annotation as it is."""
    sections = [kind for kind in get_args(annotation) if isinstance(kind, type) and issubclass(kind, Section)]
    return sections[0] if sections and type(None) in get_args(annotation) else annotation


def _keys_of(schema: type[BaseModel], location: list[str]) -> list[str]:
    """Field names of the section at `location`."""
    section: Any = schema
    for part in location:
        if isinstance(section, type) and issubclass(section, BaseModel):
            section = section_of(section.model_fields[part].annotation)
        else:  # a mapping or list of sections
            section = next((arg for arg in reversed(get_args(section))), None)
    if isinstance(section, type) and issubclass(section, BaseModel):
        return [field.alias or name for name, field in section.model_fields.items()]
    return []
