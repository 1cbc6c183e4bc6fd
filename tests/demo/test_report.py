"""The report says what the numbers say, whichever way they fall."""

import json
import re

import pytest

from megatron_mixcpt.demo.report import how_measured, metrics_table, sample_questions, verdict, write_report
from megatron_mixcpt.report.figures import LEFT, RIGHT, WIDTH
from megatron_mixcpt.report.plane import Point, plane_chart
from tests.observe.browser import open_page


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
    assert ("did not lose less" in text) == (name == "cpt")
    assert "+5.0%" in text and "+100.0%" in text
    assert ("more than cpt (90% against 10%" in text) == (name == "mixcpt")
    assert ("fewer than cpt (10% against 90%" in text) == (name == "cpt")


def test_a_large_loss_is_given_as_a_factor():
    text = verdict(arms(arm(530.0, 0.5), arm(21.0, 0.5)))
    assert "changed by +5.0%, that of cpt by a factor of 26.5" in text


def test_a_draw_is_not_a_win():
    text = verdict(arms(arm(21.0, 0.5), arm(21.0, 0.5)))
    assert "did not lose less" in text and "as many as cpt" in text


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
    write_report(tmp_path, measured, title="T", settings=[("lr", "1")], seconds=[("base", 12.4)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report) == ["base", "cpt", "mixcpt", "aligned"]
    for name in report:
        assert {"domain_ppl", "general_ppl", "fact_recall"} <= set(report[name])
        assert report[name] == measured[name]


def test_the_page_and_its_markdown_show_table_samples_settings_and_time(tmp_path):
    measured = arms(arm(40.0, 0.2), arm(21.0, 0.8))
    seconds = [("base", 12.4), ("cpt-train", 100.0)]
    write_report(tmp_path, measured, title="Title", settings=[("lr", "0.1")], seconds=seconds)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Title")
    assert metrics_table(measured).markdown() in text and verdict(measured) in text and how_measured(measured) in text
    for index in sample_questions(measured["base"]):
        assert f"| model | Q{index}? Expected: a{index} | right |" in text
    assert "| base | (nothing) | ✗ |" in text and "| mixcpt | a0 | ✓ |" in text
    assert "| lr | 0.1 |" in text and "| all | 112 |" in text
    assert "Learned and forgotten" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("cpt", "mixcpt"), [((80.0, 0.1), (21.0, 0.9)), ((20.0, 0.0), (20.0, 0.0))])
def test_the_plane_has_every_model_inside_even_if_nothing_differs(cpt, mixcpt):
    points = [
        Point(n, i, a["general_ppl"], 100 * a["fact_recall"], 50)
        for i, (n, a) in enumerate(arms(arm(*cpt), arm(*mixcpt)).items())
    ]
    drawn = plane_chart("what", points, "perplexity")
    dots = [float(x) for x in re.findall(r'class="dot c\d" cx="([\d.]+)"', drawn)]
    assert len(dots) == 4 and all(LEFT < x < WIDTH - RIGHT for x in dots)
    assert [x for x, _ in sorted(zip(dots, points), key=lambda pair: pair[1].x)] == sorted(dots)
    assert ("perplexity, logarithmic" in drawn) == (cpt[0] > 3 * mixcpt[0])


def test_a_browser_shows_the_page_without_complaint_wide_and_narrow(tmp_path):
    write_report(
        tmp_path, arms(arm(780.0, 0.5), arm(31.0, 0.5)), title="T", settings=[("lr", "1")], seconds=[("base", 1.0)]
    )
    page = tmp_path / "report.html"
    check = "<script>document.title = document.documentElement.scrollWidth - innerWidth;</script></body>"
    page.write_text(page.read_text().replace("</body>", check))
    for size in ((1280, 900), (500, 900)):
        document, console = open_page(page, size=size, dark=size[0] == 500)
        assert console == []
        assert int(re.search(r"<title>(.*?)</title>", document).group(1)) <= 0, "something sticks out to the right"
