"""The documentation says what the code does."""

import importlib.util
import re
from pathlib import Path

import pytest

from megatron_mixcpt.cli import COMMANDS
from megatron_mixcpt.config import Config, load_config
from megatron_mixcpt.huggingface.families import FAMILIES

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "kernels").glob("*.md")),
    ROOT / "launch" / "README.md",
]


def test_the_configuration_page_is_made_from_the_classes():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate_configuration.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    written = (ROOT / "docs" / "configuration.md").read_text()
    assert generate.page() == written, "run: python docs/generate_configuration.py"


def test_every_command_is_documented():
    page = (ROOT / "docs" / "commands.md").read_text()
    assert [command for command in COMMANDS if f"`mixcpt {command}" not in page] == []


def test_every_family_of_models_is_in_the_table():
    page = (ROOT / "docs" / "models.md").read_text()
    types = re.findall(r"^\| [^|]+ \| ([^|]+) \| [^|]+ \|$", page, flags=re.M)
    assert set(re.findall(r"`([a-z0-9_]+)`", " ".join(types))) == {*FAMILIES, "model_type"}


def test_make_targets_named_in_the_documentation_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for page in PAGES:
        named = set(re.findall(r"`make ([a-z][a-z-]*)", page.read_text()))
        assert named <= targets, f"{page}: {named - targets}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", ["adapters", "forgetting", "teachers"])
def test_the_example_of_a_page_is_read_as_a_file_of_mixcpt_train(page, tmp_path):
    example = re.search("```yaml\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), flags=re.S)[1]
    missing = {"model": "{preset: tiny}", "data": "{mix: mix.json}", "train": "{steps: 1, lr: 1e-3}", "run_dir": "run"}
    added = "".join(f"{key}: {value}\n" for key, value in missing.items() if not re.search(f"^{key}:", example, re.M))
    (tmp_path / "train.yaml").write_text(added + example)
    load_config(Config, tmp_path / "train.yaml")
