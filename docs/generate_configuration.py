"""Write docs/configuration.md from the configuration classes: python docs/generate_configuration.py."""

import json
from pathlib import Path
from typing import get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from megatron_mixcpt.config import Config
from megatron_mixcpt.config.reader import section_of
from megatron_mixcpt.recall.config import (
    Amounts,
    Filters,
    OpenAIEngine,
    Overlap,
    RecallModel,
    SamplingSettings,
    TextSettings,
    TransformersEngine,
)
from megatron_mixcpt.select.config import SelectSettings

INTRODUCTION = """# Configuration of `mixcpt train` and `mixcpt align`

Defaults < YAML file < `key=value` on the command line. An unknown key is an error that names the nearest one; wrong
values are named with their ranges, all at once, before any process starts. Paths are relative to the current directory.
The resolved configuration is written to `<run_dir>/config.yaml`. This page is made from the classes in
`megatron_mixcpt/config/schema.py` by `python docs/generate_configuration.py`.
"""

SELECT = "`model` and `parallel` as above, `data.mix`, `out` (folder of the result), and"


RECALL = "`out` (folder of the result), and the following; [recall.md](recall.md) explains them."
RECALL_SECTIONS = {
    "model": RecallModel,
    "n": Amounts,
    "engine.transformers": TransformersEngine,
    "engine.openai": OpenAIEngine,
    "text": TextSettings,
    "sampling": SamplingSettings,
    "filters": Filters,
    "overlap.<name>": Overlap,
}


def page() -> str:
    """The whole page as Markdown."""
    parts = [INTRODUCTION]
    own = []
    for name, field in Config.model_fields.items():
        section = section_of(field.annotation)
        if isinstance(section, type) and issubclass(section, BaseModel):
            note = "" if section is field.annotation else f"{field.description}\n\n"
            parts.append(f"## `{name}`\n\n{note}{_section(name, section)}")
        else:
            own.append(_row(name, field))
    parts.append("## Top level\n\n" + _head() + "\n".join(own))
    select = _section("select", SelectSettings)
    parts.append(f"# Configuration of `mixcpt select`\n\n{SELECT}\n\n## `select`\n\n{select}")
    parts.append(f"# Configuration of `mixcpt recall`\n\n{RECALL}")
    parts += [f"## `{name}`\n\n{_section(name, section)}" for name, section in RECALL_SECTIONS.items()]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _section(name: str, section: type[BaseModel]) -> str:
    return f"{_summary(section)}\n\n{_table(name, section)}"


def _summary(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").split())


def _table(prefix: str, section: type[BaseModel]) -> str:
    return _head() + "\n".join(_rows(prefix, section))


def _rows(prefix: str, section: type[BaseModel]) -> list[str]:
    rows = []
    for name, field in section.model_fields.items():
        key = f"{prefix}.{field.alias or name}"
        rows.append(_row(key, field))
        optional = () if get_origin(field.annotation) is dict else get_args(field.annotation)
        for option in optional:  # a section that may be left out
            if isinstance(option, type) and issubclass(option, BaseModel):
                rows += _rows(key, option)
    return rows


def _head() -> str:
    return "| key | values | default | meaning |\n|---|---|---|---|\n"


def _row(key: str, field) -> str:
    default = "**required**" if field.is_required() else f"`{_plain(field)}`"
    return f"| `{key}` | {_values(field)} | {default} | {' '.join((field.description or '').split())} |"


def _plain(field) -> str:
    value = field.default if field.default is not PydanticUndefined else field.default_factory()
    if isinstance(value, BaseModel):
        value = value.model_dump()
    return value if isinstance(value, str) else json.dumps(value)


def _values(field) -> str:
    options = get_args(field.annotation)
    if options and all(isinstance(option, str) for option in options):
        return ", ".join(f"`{option}`" for option in options)
    text = str(field.annotation)
    kind = next(
        word
        for name, word in (
            ("Config", "mapping"),
            ("Settings", "mapping"),
            ("dict", "mapping"),
            ("list", "list"),
            ("bool", "true, false"),
            ("float", "number"),
            ("int", "integer"),
            ("str", "text"),
        )
        if name in text
    )
    rules = [*field.metadata]
    for option in options:  # Optional[Annotated[int, Field(ge=1)]]
        for info in getattr(option, "__metadata__", ()):
            rules += info.metadata
    bounds = [
        f"{sign} {getattr(rule, name):g}"
        for rule in rules
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if getattr(rule, name, None) is not None
    ]
    return " ".join([kind, ", ".join(bounds)]).strip()


if __name__ == "__main__":
    (Path(__file__).parent / "configuration.md").write_text(page())
