"""A finished stage is skipped, an unfinished one continues, a changed one starts from nothing."""

import io

import pytest

from megatron_mixcpt.demo.console import DemoConsole
from megatron_mixcpt.demo.stages import MARKER, Stages, open_folder
from megatron_mixcpt.errors import ConfigError


class Bench:
    """Stages in a folder and a counter of the work that was really done."""

    def __init__(self, folder):
        self.folder, self.output = folder, folder / "out"
        self.log = io.StringIO()
        self.calls = 0

    def run(self, settings, after=(), fail=False, name="stage"):
        stages = Stages(self.folder, DemoConsole({"stage": 1.0, "next": 1.0}, file=self.log))

        def work(progress):
            self.calls += 1
            self.output.mkdir(exist_ok=True)
            self.found = sorted(path.name for path in self.output.iterdir())
            (self.output / f"part{self.calls}").touch()
            if fail:
                raise KeyboardInterrupt
            return {"calls": self.calls}

        return stages.run(name, "Working", settings, [self.output], work, after)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_a_finished_stage_is_skipped_and_its_result_remembered(bench):
    first = bench.run({"lr": 1})
    again = bench.run({"lr": 1})
    assert bench.calls == 1 and again == first and again.result == {"calls": 1}
    assert "skipped" in bench.log.getvalue()


def test_other_settings_run_it_again_from_nothing(bench):
    first = bench.run({"lr": 1})
    second = bench.run({"lr": 2})
    assert bench.calls == 2 and bench.found == [] and second.key != first.key


def test_an_interrupted_stage_finds_what_it_had_written(bench):
    with pytest.raises(KeyboardInterrupt):
        bench.run({"lr": 1}, fail=True)
    assert bench.run({"lr": 1}).result == {"calls": 2}
    assert bench.found == ["part1"]


def test_an_interrupted_stage_of_other_settings_finds_nothing(bench):
    with pytest.raises(KeyboardInterrupt):
        bench.run({"lr": 1}, fail=True)
    bench.run({"lr": 2})
    assert bench.found == []


def test_a_missing_output_runs_it_again(bench):
    bench.run({"lr": 1})
    for path in bench.output.iterdir():
        path.unlink()
    bench.output.rmdir()
    bench.run({"lr": 1})
    assert bench.calls == 2


def test_a_changed_predecessor_runs_it_again(bench):
    before = bench.run({"lr": 1})
    bench.run({}, after=[before], name="next")
    bench.run({}, after=[before], name="next")
    assert bench.calls == 2
    changed = bench.run({"lr": 2})
    bench.run({}, after=[changed], name="next")
    assert bench.calls == 4


def test_a_torn_receipt_counts_as_none(bench):
    bench.run({"lr": 1})
    (bench.folder / "receipts/stage.json").write_text('{"key": "12')
    bench.run({"lr": 1})
    assert bench.calls == 2 and bench.found == []


def test_seconds_add_up_over_attempts(bench):
    with pytest.raises(KeyboardInterrupt):
        bench.run({"lr": 1}, fail=True)
    import json

    receipt = json.loads((bench.folder / "receipts/stage.json").read_text())
    receipt["seconds"] = 100.0
    (bench.folder / "receipts/stage.json").write_text(json.dumps(receipt))
    assert bench.run({"lr": 1}).seconds >= 100.0


def test_a_folder_of_another_purpose_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(ConfigError, match="not made by the demo"):
            open_folder(tmp_path, fresh=fresh).__enter__()
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_fresh_empties_the_demos_own_folder_and_only_then(tmp_path):
    folder = tmp_path / "runs/demo"
    with open_folder(folder, fresh=False):
        (folder / "receipts").mkdir()
    with open_folder(folder, fresh=False):
        assert (folder / "receipts").is_dir()
    with open_folder(folder, fresh=True):
        assert not (folder / "receipts").exists()
    assert [path.name for path in folder.iterdir()] == [MARKER]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_second_demo_in_the_same_folder_is_refused_and_takes_nothing(tmp_path, fresh):
    with open_folder(tmp_path / "demo", fresh=False):
        (tmp_path / "demo/receipts").mkdir()
        with pytest.raises(ConfigError, match=r"demo is in use by process .*: wait for its end, or choose another"):
            open_folder(tmp_path / "demo", fresh=fresh).__enter__()
        assert (tmp_path / "demo/receipts").is_dir()
