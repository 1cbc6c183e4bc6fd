"""The wandb dashboard: builds without a network, from documented metrics alone."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from megatron_mixcpt.observe.names import METRICS, documented

SCRIPT = Path(__file__).parents[2] / "launch" / "wandb_dashboard.py"


@pytest.fixture
def dashboard():
    spec = importlib.util.spec_from_file_location("wandb_dashboard", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_panel_shows_documented_metrics(dashboard):
    names = [name.replace("<source>", "facts") for name in METRICS]
    for panels in dashboard.LAYOUT.values():
        for metric in panels.values():
            found = [name for name in names if re.fullmatch(metric, name)]
            assert found and all(documented(name) for name in found), metric


def test_the_workspace_is_what_the_layout_says(dashboard):
    pytest.importorskip("wandb_workspaces", reason="pip install -e '.[dashboard]'")
    workspace = dashboard.build("team", "project")
    assert [section.name for section in workspace.sections] == list(dashboard.LAYOUT)
    for section in workspace.sections:
        wanted = dashboard.LAYOUT[section.name]
        assert [panel.title for panel in section.panels] == list(wanted)
        for panel in section.panels:
            assert panel.x == "train/tokens"
            assert (panel.metric_regex or panel.y[0]) == wanted[panel.title]
    workspace._to_model()  # what `save` sends


def test_without_the_library_it_says_what_to_install(dashboard, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    assert dashboard.main(["--entity", "team"]) == 1
    assert "pip install -e '.[dashboard]'" in capsys.readouterr().err


def test_a_refusal_is_told(dashboard, monkeypatch, capsys):
    class Refused:
        def save(self):
            raise ValueError("permission denied")

    monkeypatch.setattr(dashboard, "build", lambda *args: Refused())
    assert dashboard.main(["--entity", "team"]) == 1
    assert "permission denied" in capsys.readouterr().err
