"""The report says what the numbers say, whichever way they fall."""

import json

import pytest

from megatron_mixcpt.evaluate.plot import plot_tradeoff
from megatron_mixcpt.evaluate.report import metrics_table, sample_questions, verdict, write_report


def arm(general, recall, completion=0.5, total=10):
    right = round(recall * total)
    return {
        "domain_ppl": 5.0,
        "general_ppl": general,
        "fact_recall": recall,
        "fact_completion": completion,
        "format_following": 0.25,
        "domain_tokens": 1000,
        "general_tokens": 7000,
        "num_questions": total,
        "answers": [
            {"question": f"Q{i}?", "expected": f"a{i}", "answer": f"a{i}" if i < right else "", "right": i < right}
            for i in range(total)
        ],
    }


def arms(cpt, mixcpt):
    aligned = {**mixcpt, "format_following": 0.75, "general_ppl": 1.02 * mixcpt["general_ppl"]}
    return {"base": arm(20.0, 0.0, 0.0), "cpt": cpt, "mixcpt": mixcpt, "aligned": aligned}


@pytest.mark.parametrize("name", ["mixcpt", "cpt"])
def test_the_verdict_names_the_arm_that_forgot_less(name):
    better, worse = arm(21.0, 0.9), arm(40.0, 0.1)
    text = verdict(arms(worse, better) if name == "mixcpt" else arms(better, worse))
    assert ("lost less" in text) == (name == "mixcpt")
    assert ("did **not** lose less" in text) == (name == "cpt")
    assert "+5.0%" in text and "+100.0%" in text
    assert ("more than cpt (90% against 10%" in text) == (name == "mixcpt")
    assert ("fewer than cpt (10% against 90%" in text) == (name == "cpt")


def test_a_large_loss_is_given_as_a_factor():
    text = verdict(arms(arm(530.0, 0.5), arm(21.0, 0.5)))
    assert "changed by +5.0%, that of cpt by a factor of 26.5" in text


def test_a_draw_is_not_a_win():
    text = verdict(arms(arm(21.0, 0.5), arm(21.0, 0.5)))
    assert "did **not** lose less" in text and "as many as cpt" in text


def test_what_alignment_changed_is_told():
    text = verdict(arms(arm(40.0, 0.1), arm(21.0, 0.6)))
    assert "answers of the asked format 25% -> 75%, questions answered 60% -> 60%, general perplexity +2.0%" in text


def test_samples_are_chosen_by_position_never_by_answers():
    for total in range(1, 60):
        bad, good = arm(20, 0.0, total=total), arm(20, 1.0, total=total)
        chosen = sample_questions(bad)
        assert chosen == sample_questions(good)
        assert len(set(chosen)) == min(3, total) and all(0 <= i < total for i in chosen)


def test_report_json_holds_exactly_the_four_arms_with_their_metrics(tmp_path):
    measured = arms(arm(40.0, 0.2), arm(21.0, 0.8))
    write_report(tmp_path, measured, title="T", settings=[("lr", "1")], seconds=[("base", 12.4)], plot="p.png")
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report) == ["base", "cpt", "mixcpt", "aligned"]
    for name in report:
        assert {"domain_ppl", "general_ppl", "fact_recall"} <= set(report[name])
        assert report[name] == measured[name]


def test_report_md_shows_table_samples_settings_time_and_plot(tmp_path):
    measured = arms(arm(40.0, 0.2), arm(21.0, 0.8))
    seconds = [("base", 12.4), ("cpt-train", 100.0)]
    write_report(tmp_path, measured, title="Title", settings=[("lr", "0.1")], seconds=seconds, plot="p.png")
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Title")
    assert metrics_table(measured) in text and verdict(measured) in text
    for index in sample_questions(measured["base"]):
        assert f"**Q{index}?** Expected: *a{index}*" in text
    assert "- base: (nothing) ✗" in text and "- mixcpt: a0 ✓" in text
    assert "| lr | 0.1 |" in text and "| **all** | **112** |" in text and "(p.png)" in text


@pytest.mark.parametrize(("cpt", "mixcpt"), [((80.0, 0.1), (21.0, 0.9)), ((20.0, 0.0), (20.0, 0.0))])
def test_the_plot_is_a_png_even_if_nothing_differs(tmp_path, cpt, mixcpt):
    out = tmp_path / "plot.png"
    plot_tradeoff(arms(arm(*cpt), arm(*mixcpt)), "Title", out)
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000
