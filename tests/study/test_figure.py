"""The plane of gain over forgetting."""

import re

from megatron_mixcpt.study.figure import Curve, Mark, trade_chart


def chart(error):
    mean = Mark("mean", 0.05, 40.0, error)
    rates = [Mark("low", 0.01, 10.0), Mark("high", 0.3, 60.0)]
    return str(trade_chart("facts", [Curve(0, rates, [], mean)], [], "forgotten", " %"))


def test_an_interval_that_is_wider_than_the_figure_is_cut_off_and_moves_nothing():
    circles = re.compile(r"<circle[^>]*>")
    wide, narrow = chart((0.5, 127.0)), chart((0.001, 1.0))
    assert circles.findall(wide) == circles.findall(narrow) and len(circles.findall(wide)) == 3
    height = float(re.search(r'viewBox="0 0 \d+ (\d+)"', wide)[1])
    ends = [
        float(y)
        for path in re.findall(r'<path class="line c0" d="([^"]*)"', wide)
        for y in re.findall(r" (-?[\d.]+)", path)
    ]
    assert min(ends) >= 0 and max(ends) <= height
