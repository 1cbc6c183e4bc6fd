"""The benchmarks of the loss run from end to end on a tiny problem, and their tables say what was measured."""

import importlib
import json

import pytest
import torch

from benchmarks import lssd_cpu, lssd_gpu
from benchmarks.lssd_eager import eager_lssd_loss
from benchmarks.lssd_report import Case, Record, aims, table
from tests.kernels.oracle import oracle
from tests.kernels.problems import problem


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    monkeypatch.setenv("MIXCPT_LSSD", "reference")


def test_eager_and_exact_losses_are_the_loss():
    student, teacher, labels, _ = problem((9,), 50, "cpu", ignore=False)
    expected, _ = oracle(student, teacher, labels, temperature=2.0)
    torch.testing.assert_close(eager_lssd_loss(student, teacher, labels, 2.0).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lssd_gpu.exact_loss(student.double(), teacher, labels, 2.0), expected)


def test_cpu_benchmark_prints_times_and_flat_memory(capsys):
    threads = torch.get_num_threads()
    try:
        assert lssd_cpu.main(["--tokens", "512", "--vocab", "3000", "--threads", "1", "--repeats", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    times = [row for row in rows if row[0].strip() in ("fp32", "bf16")]
    assert len(times) == 4 and all(float(cell) > 0 for row in times for cell in row[1:])
    beyond = [float(row[4]) for row in rows if row[0].strip().isdigit()]
    assert len(beyond) == 3 and max(beyond[1:]) - min(beyond[1:]) < 1


def test_gpu_benchmark_writes_table_records_and_plot(tmp_path):
    arguments = ["--device", "cpu", "--tokens", "8", "16", "--vocab", "64", "128", "--mask", "0", "50"]
    arguments += ["--linear", "16", "8", "64", "--out", str(tmp_path), "--only", "ours", "eager", "ours, CE only"]
    assert lssd_gpu.main(arguments) == 0
    report = (tmp_path / "lssd_gpu.md").read_text()
    assert "a trial of this program, not a measurement" in report and "### 16 x 128 fp32, tau 2, 50 % masked" in report
    records = json.loads((tmp_path / "lssd_gpu.json").read_text())
    assert len(records) == 2 * 2 * 2 * 2 * 2 * 3
    ran = [r for r in records if not r["note"]]
    assert {r["name"] for r in ran} == {"ours", "eager", "ours, CE only"}
    assert all(r["both"] > 0 and r["memory"] > 0 for r in ran)
    ours = [r for r in ran if r["name"] == "ours"]
    assert all(r["loss_error"] < 1e-4 and r["gradient_error"] < 1e-2 for r in ours)
    assert (tmp_path / "lssd_gpu.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lssd_gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_absent_and_failing_contenders_are_lines_of_the_table():
    case = Case(8, 64, "bf16", 1.0, 0)
    absent = lssd_gpu.Contender("absent", "KL", lambda temperature: importlib.import_module("no_such_module"))
    failing = lssd_gpu.Contender("failing", "KL", lambda temperature: lambda s, t, y: s.nothing)
    records = [lssd_gpu.measure(contender, case, "cpu") for contender in (absent, failing)]
    assert [record.note for record in records] == ["not installed", "failed: AttributeError"]
    assert "| absent | KL |  |  |  |  |  |  |  |  | not installed |" in table(records, 100.0)
    ours = lssd_gpu.Contender("ours", "KL", lambda temperature: lambda s, t, y: s.nothing)
    with pytest.raises(AttributeError):
        lssd_gpu.measure(ours, case, "cpu")


def test_bandwidth_counts_ten_bytes_a_logit_and_the_aims_follow():
    case = Case(1000, 1000, "bf16", 1.0, 0)
    assert case.floor_bytes == 10 * 1000 * 1000
    assert Case(1000, 1000, "fp32", 1.0, 50).floor_bytes == 4 * (2 + 1) * 1000 * 1000
    records = [
        Record(case, "ours", "swap + KL + CE", 0.4, 1.0),
        Record(case, "eager", "swap + KL + CE", 5.0, 12.0),
        Record(case, "peer", "KL", 1.0, 1.5),
        Record(case, "quack", "CE", 0.1, 0.2),
    ]
    assert records[0].bandwidth == pytest.approx(10.0)
    assert aims(records, 11.0).splitlines()[-1].endswith("| 0.909 | 12 | 1.5 |")
