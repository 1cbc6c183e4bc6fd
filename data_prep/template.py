"""Field templates such as "{title}\\n\\n{text}": which keys of a record become text."""

from collections.abc import Callable, Mapping
from string import Formatter
from typing import Any


class BadRecord(Exception):
    """A record that cannot be used. `reason` is short and countable, `detail` says what exactly."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def template_keys(template: str) -> list[str]:
    """The keys a template reads. Raises ValueError for anything but plain `{key}` fields (`{{` is a literal brace)."""
    keys = []
    for _, field, spec, conversion in Formatter().parse(template):
        if field is None:
            continue
        if not field or spec or conversion:
            raise ValueError(f"template {template!r}: write fields as {{key}}, and literal braces doubled: {{{{ }}}}")
        keys.append(field)
    if not keys:
        raise ValueError(f"template {template!r} reads no key of the record; name one in braces, as in '{{text}}'")
    return keys


def get_value(record: Mapping[str, Any], key: str) -> Any:
    """The value under `key`. Raises BadRecord naming the keys that are there."""
    try:
        return record[key]
    except KeyError:
        there = ", ".join(list(record)[:8]) or "none"
        raise BadRecord("missing key", f"no key {key!r}; the record has: {there}") from None


def get_text(record: Mapping[str, Any], key: str) -> str:
    """The string under `key`. Raises BadRecord if it is missing or not a string."""
    value = get_value(record, key)
    if not isinstance(value, str):
        raise BadRecord("wrong type", f"key {key!r} is {type(value).__name__}, not a string")
    return value


def compile_template(template: str) -> Callable[[Mapping[str, Any]], str]:
    """A function that fills `template` from a record; values must be strings. Raises ValueError, later BadRecord."""
    keys = template_keys(template)
    if template == "{" + keys[0] + "}":
        key = keys[0]
        return lambda record: get_text(record, key)
    parts: list[tuple[str, str | None]] = [(text, field) for text, field, _, _ in Formatter().parse(template)]

    def fill(record: Mapping[str, Any]) -> str:
        return "".join(text + (get_text(record, field) if field is not None else "") for text, field in parts)

    return fill
