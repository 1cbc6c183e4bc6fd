"""The report page: self-contained, without errors in a real browser, for any run however far it got."""

import html
import json
import math
import re

import matplotlib.image
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_mixcpt.checkpoint.info import render_info
from megatron_mixcpt.checkpoint.store import list_checkpoints
from megatron_mixcpt.cli import main
from megatron_mixcpt.data_prep.mix import Mix, Source, TokenizerEntry, write_mix
from megatron_mixcpt.observe import run_data
from megatron_mixcpt.observe.run_data import differing_settings, read_run
from megatron_mixcpt.observe.run_report import page
from megatron_mixcpt.report.figures import MAX_POINTS, Series, bar_chart, line_chart, thin, tick_labels, ticks
from megatron_mixcpt.report.page import Html, Table
from megatron_mixcpt.units import number
from tests.helpers.checkpoints import checkpoint_info
from tests.observe.browser import open_page

SOURCES = {"facts": (2.9, 1.8), "general <text>": (2.2, 2.3)}


def write_run(folder, *, steps=120, total=120, validate=True, lr=1e-4, kd=1.0, tail=""):
    """A run directory with plausible curves, a skipped step and a checkpoint."""
    folder.mkdir(parents=True)
    rows = []

    def validation(step):
        row = {"step": step, "train/tokens": 900 * step, "time/validation": 0.5}
        for name, (before, after) in SOURCES.items():
            loss = after + (before - after) * math.exp(-step / 30)
            row |= {f"val/{name}/loss": loss, f"val/{name}/ppl": math.exp(loss), f"forget/{name}/delta": loss - before}
        return row

    rows += [validation(0)] * validate
    for step in range(1, steps + 1):
        loss = None if step == 7 else 2.0 + math.exp(-step / 20) + 0.1 * math.sin(step)
        row = {"step": step, "train/tokens": 900 * step, "train/loss": loss, "train/ce": 2.5, "train/kd": 0.1 * kd}
        row |= {f"train/ce/{name}": 2.0 + step % 3 for name in SOURCES}
        row |= {f"mix/share/{name}": 0.5 for name in SOURCES} | {f"mix/tokens/{name}": 450 * step for name in SOURCES}
        row |= {"optim/lr": lr * step, "optim/grad_norm": 1.0, "optim/skipped": int(step >= 7), "data/stream": "ab"}
        row |= {"speed/tok_per_s_gpu": 1000.0 + step, "speed/step_seconds": 1.0, "speed/data_pct": 0.5}
        row |= {"time/data": 0.1, "time/forward": 0.4, "time/backward": 0.5, "rewards/new": step / 10}
        rows.append(row)
        if validate and step % 40 == 0:
            rows.append(validation(step))
    rows += [{"step": 40, "ckpt/seconds": 2.0, "ckpt/blocked_seconds": 0.5}, {"step": 80, "ckpt/failed": 1}] * (
        steps > 80
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    settings = {"model": {"preset": "tiny"}, "train": {"steps": total, "lr": lr, "global_batch_size": 8}}
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, "run_dir": str(folder)}))
    if steps > 40:
        checkpoint = folder / "checkpoints" / "step_00000040"
        checkpoint.mkdir(parents=True)
        drawn = {"content": "", "sequences": 100, "weight": 0.5, "drawn": 160, "since": 160}
        info = checkpoint_info(40, data={"seed": 1, "sources": dict.fromkeys(SOURCES, drawn)})
        (checkpoint / "checkpoint.json").write_text(json.dumps(render_info(info)))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "mixcpt")
    write_run(folder / "plain", kd=0.0, lr=3e-4, steps=70, tail='{"step": 71, "train/lo')  # killed
    return folder


@pytest.fixture(scope="module")
def compared(runs):
    """The page of two runs, written by the command."""
    out = runs / "pages" / "compare.html"
    assert main(["report", str(runs / "mixcpt"), str(runs / "plain"), "--out", str(out)]) == 0
    return out


def test_the_page_draws_the_budget_beside_what_was_forgotten_and_the_distance_by_kind(tmp_path):
    run = write_run(tmp_path / "kept", steps=3)
    rows = [{"step": 2, "forget/forgotten": 0.01, "forget/budget": 0.05}, {"step": 3, "forget/forgotten": 0.02}]
    rows[1] |= {"forget/budget": 0.05, "train/kl_base/domain": 0.1, "train/kl_base/source/facts": 0.2}
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    forgotten = text[text.index("rise of the worst loss") :]
    assert "budget, kept" in forgotten[: forgotten.index("</svg>")]
    by_kind = text[text.index("Distance from the base by kind") :]
    assert "domain" in by_kind and "source/facts" not in text


def test_the_page_needs_nothing_from_elsewhere(compared):
    text = compared.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", text) and "@import" not in text and "url(#" in text
    assert not re.search(r"url\((?!#)", text)
    assert set(re.findall(r"https?://[^\"' <]+", text)) == {"http://www.w3.org/2000/svg"}


def test_a_browser_shows_it_without_complaint(compared, tmp_path):
    checks = """<script>
      const svg = document.querySelector("svg[data-chart]"), box = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.x + box.width / 2, clientY: box.y + 9}));
      const before = document.documentElement.dataset.theme;
      document.getElementById("theme").click();
      document.title = JSON.stringify({over: document.documentElement.scrollWidth - innerWidth, width: innerWidth,
        tip: document.getElementById("tip").innerText, themes: [before, document.documentElement.dataset.theme]});
    </script>"""
    copy = tmp_path / "page.html"
    copy.write_text(compared.read_text().replace("</body>", checks + "</body>"))
    for size, dark in (((1280, 900), False), ((500, 900), True)):
        document, console = open_page(copy, size=size, dark=dark)
        assert console == []
        found = json.loads(re.search(r"<title>(.*?)</title>", document, re.S).group(1))
        assert found["over"] <= 0 and found["width"] == size[0], "nothing sticks out to the right"
        assert found["themes"] == (["dark", "light"] if dark else ["light", "dark"])
        assert "step" in found["tip"] and "mixcpt" in found["tip"] and "plain" in found["tip"]


def test_light_and_dark_look_like_it(compared, tmp_path):
    for dark in (False, True):
        picture = tmp_path / f"{dark}.png"
        _, console = open_page(compared, screenshot=picture, dark=dark)
        pixels = matplotlib.image.imread(picture)[..., :3]
        assert console == [] and pixels.shape[:2] == (900, 1280)
        assert (pixels.mean() < 0.25) == dark and (pixels.mean() > 0.85) == (not dark)
        assert pixels.std() > 0.05  # not blank


def test_several_runs_are_told_apart(compared):
    text = compared.read_text()
    assert "finished, 120 steps" in text and "at step 70 of 120, last written" in text
    table = text.split("Settings that differ")[1].split("</table>")[0]
    assert re.findall(r"<code>([^<]+)", table) == ["train.lr"] and "0.0003" in table
    assert "step 7: skipped" in text and "step 80: the checkpoint could not be saved" in text
    assert "Perplexity: facts" in text and "rewards/new" in text


def test_held_out_preference_pairs_are_shown_before_and_now(tmp_path):
    folder = write_run(tmp_path / "dpo", validate=False)
    with (folder / "metrics.jsonl").open("a") as file:
        for step, (loss, accuracy, margin) in {0: (0.6931, 0.5, 0.0), 120: (0.6021, 0.875, 0.2345)}.items():
            row = {"step": step, "val/pairs/loss": loss, "val/pairs/accuracy": accuracy, "val/pairs/margin": margin}
            file.write(json.dumps(row) + "\n")
    text = page([read_run(folder)])
    table = text.split("Held-out preference pairs</h2>")[1].split("</table>")[0]
    assert re.findall(r"<td[^>]*>([^<]*)", table) == ["pairs", "50.0%", "87.5%", "0.0000", "0.2345", "0.6931", "0.6021"]
    assert "Accuracy on held-out pairs" in text and "Margin on held-out pairs" in text
    assert "What it learned" not in text and "val/pairs" not in text
    both = page([read_run(folder), read_run(write_run(tmp_path / "stage1"))])
    assert "Accuracy on held-out pairs: pairs" in both and "Perplexity: facts" in both


def test_the_routing_of_a_mixture_of_experts_is_drawn_over_time_and_by_layer(tmp_path):
    def write(name):
        rows = []
        for step in range(1, 31):
            row = {"step": step, "train/tokens": 900 * step, "train/loss": 2.0, "moe/balance": 1.1, "moe/z": 4.0}
            row |= {"moe/load_max": 3.0, "moe/idle": 0.25, "moe/changed": step / 300}
            for layer in range(12):
                row |= {f"moe/load_max/{layer}": 2.0 + layer / 11, f"moe/load_min/{layer}": 0.5}
                row |= {f"moe/changed/{layer}": step / 300 * (1 + layer / 11)}
            rows.append(row)
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return read_run(tmp_path / name)

    def charts(svg_page):
        data = re.findall(r'aria-label="([^"]*)" data-chart="([^"]*)"', svg_page)
        return {label: json.loads(html.unescape(chart)) for label, chart in data}

    one = charts(page([write("one")]))
    assert {"Routing changed", "Largest load", "Idle experts", "Balance"} <= one.keys()
    assert not any("moe/" in label for label in one), "no chart a layer"
    largest, smallest = one["Load, by layer"]["series"]
    assert largest["points"] == [[layer, pytest.approx(2.0 + layer / 11)] for layer in range(12)]
    assert (largest["name"], smallest["name"]) == ("largest", "smallest")
    (changed,) = one["Routing changed, by layer"]["series"]
    assert changed["points"][11][1] == pytest.approx(100 * 2 * 29 / 300)  # mean of the last three steps
    both = charts(page([write("a"), write("b")]))
    assert [series["name"] for series in both["Load, by layer"]["series"]] == [
        "a, largest", "a, smallest", "b, largest", "b, smallest",
    ]  # fmt: skip


def test_what_looks_like_markup_is_text_in_markdown_too():
    table = Table(
        ["answer", "as"], [["a<b and c>d <think>no</think> | &amp;", Html("<code>1 &lt; 2</code>")], [None, 3]]
    )
    assert table.markdown().splitlines()[2:] == [
        r"| a\<b and c>d \<think>no\</think> \| &amp; | 1 < 2 |",
        "| – | 3 |",
    ]


def test_names_are_text_not_markup(compared):
    text = compared.read_text()
    assert "general <text>" not in text and "general &lt;text&gt;" in text


# What an earlier version wrote of a model that is lost.
DIVERGED = "".join(f'{{"step": 121, "val/{name}/loss": NaN, "val/{name}/ppl": Infinity}}\n' for name in SOURCES)


@pytest.mark.parametrize(
    "options",
    [
        {"validate": False},
        {"steps": 1, "total": 500},
        {"steps": 1, "validate": False},
        {"steps": 0},
        {"steps": 0, "validate": False},
        {"steps": 0, "validate": False, "tail": "garbage\n[1, 2]\n{}\n"},
        {"tail": DIVERGED},
    ],
    ids=str,
)
def test_a_run_that_did_not_get_far_has_a_page(tmp_path, options):
    run = read_run(write_run(tmp_path / "run", **options))
    text = page([run])
    steps = options.get("steps", 120)
    assert ("no step yet" in text) == (steps == 0)
    assert ("What it learned" in text) == options.get("validate", True)
    assert "nan" not in text.replace("nance", "") and "None" not in text


def test_a_run_without_settings_or_checkpoints_has_a_page(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text("train: [unclosed")
    (run / "checkpoints" / "step_00000040" / "checkpoint.json").write_text("{")
    assert "at step 120, last written" in page([read_run(run)])


def test_a_checkpoint_that_a_live_run_removes_meanwhile_is_left_out(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    gone = run / "checkpoints" / "step_00000020"
    monkeypatch.setattr(run_data, "list_checkpoints", lambda folder: [*list_checkpoints(folder), gone])
    assert [saved.step for saved in read_run(run).checkpoints] == [40]


def test_what_is_no_run_is_told(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "is no run directory: a run has a metrics.jsonl" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "absent")]) == 2
    assert "no such directory" in capsys.readouterr().err
    run = write_run(tmp_path / "run")
    assert main(["report", str(run), "--out", str(tmp_path)]) == 2
    assert "is a directory: name a file" in capsys.readouterr().err
    assert main(["report", str(run)]) == 0 and (run / "report.html").exists()


def test_settings_that_are_the_same_do_not_differ(runs):
    one, two = (read_run(runs / name) for name in ("mixcpt", "plain"))
    assert differing_settings([one, two]) == {"train.lr": [1e-4, 3e-4]}
    two.settings["extra"] = None
    one.settings["loss.margin"] = 0.2
    assert differing_settings([one, two])["loss.margin"] == [0.2, None]


finite = st.floats(-1e12, 1e12, allow_nan=False)


@given(finite, finite, st.integers(2, 8))
def test_ticks_are_few_and_inside(a, b, count):
    low, high = min(a, b), max(a, b)
    found = ticks(low, high, count)
    room = 1e-6 * max(abs(low), abs(high), high - low)
    assert len(found) <= 2 * count + 2 and all(low - room <= tick <= high + room for tick in found)


@given(st.floats(0.1, 1e9), st.floats(1e-8, 10.0))
def test_labels_of_ticks_are_the_ticks_however_near_each_other(low, share):
    found = ticks(low, low * (1 + share), 5)
    factors = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    read = [float(text.rstrip("kMGT")) * factors.get(text[-1], 1.0) for text in tick_labels(found)]
    assert read == pytest.approx(found, abs=0.01 * (found[1] - found[0]), rel=0)


def labels_of(svg):
    return [float(label.rstrip("%")) for label in re.findall(r'text-anchor="end">([^<]+)', svg)]


def test_noise_is_not_drawn_as_drama():
    labels = labels_of(line_chart("loss", [Series("one", [(1, 0.69314), (2, 0.69310)], 0)], "step"))
    assert len(set(labels)) == len(labels) >= 3 and 0.02 < max(labels) - min(labels) < 0.05
    small = labels_of(line_chart("delta", [Series("one", [(1, 1e-4), (2, -1e-4)], 0)], "step", zero=True))
    assert 0.02 <= max(small) - min(small) <= 0.06


def heights(svg):
    """Of each line's end, from the top."""
    return [float(path.split()[-1]) for path in re.findall(r'<path class="line[^"]*" d="([^"]+)"', svg)]


def test_one_bad_scale_flattens_no_comparison():
    lines = [Series(name, [(1, 3.0 * k), (2, 2.0 * k), (3, k)], i) for i, (name, k) in enumerate([("a", 1), ("b", 2)])]
    bad = Series("bad", [(1, 3e3), (2, 9e3), (3, 8e3)], 2)
    low, high = (heights(line_chart("ppl", [*lines, bad], "step"))[i] for i in (0, 1))
    assert low - high > 10  # of 218; on a linear axis it would be 0.03
    assert "y logarithmic" in line_chart("ppl", [*lines, bad], "step")
    signed = [Series(one.name, [(x, -y) for x, y in one.points], one.colour) for one in [*lines, bad]]
    chart = line_chart("delta", signed, "step", zero=True)
    assert abs(heights(chart)[0] - heights(chart)[1]) > 10 and "bad leaves the picture, as far as -9k" in chart


def test_a_single_zero_among_many_points_takes_the_logarithm_away():
    """It is an outlier, which stretches no axis, and has a place in the picture all the same."""
    points = [(step, 0.0 if step == 70 else 1.0 + 0.01 * step) for step in range(150)]
    far = [(step, 100.0) for step in range(150)]
    svg = line_chart("ce", [Series("one", points, 0), Series("two", far, 1)], "step", smooth=True)
    assert "logarithmic" not in svg and svg.count('class="line') >= 2


def test_a_run_that_its_budget_ended_is_over(tmp_path):
    run = write_run(tmp_path / "run", steps=70)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 70, "forget/decision": "result: step 20, which learned most"}) + "\n")
    assert "ended by its forgetting budget at step 70 of 120" in page([read_run(run)])


def test_restarts_are_marked_and_domain_and_general_stand_apart(tmp_path):
    run = write_run(tmp_path / "run")
    sources = tuple(Source(name, kind, 0.5, None, None) for name, kind in zip(SOURCES, ("domain", "general")))
    tokenizer = TokenizerEntry("huggingface", tmp_path / "tokenizer", 120, "0", None, 0, 0)
    write_mix(tmp_path / "mix.json", Mix(tmp_path / "mix.json", 16, "", tokenizer, sources))
    settings = yaml.safe_load((run / "config.yaml").read_text()) | {"data": {"mix": str(tmp_path / "mix.json")}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 60, "run/resumed": 1}) + "\n")
    text = page([read_run(run)])
    assert "step 60: interrupted, and resumed from here" in text
    assert '<line class="mark"' in text.split("<h2>Training</h2>")[1].split("</svg>")[0]
    learned = text.split("What it learned")[1].split("</table>")[0]
    order = ["To be learned: the domain", "facts", "To be kept", "general &lt;text&gt;"]
    assert re.findall("|".join(order), learned) == order
    assert "Perplexity, domain" in text and "Perplexity, everything else" in text


def test_an_alignment_run_has_a_first_row_of_its_own(tmp_path):
    run = write_run(tmp_path / "dpo", validate=False)
    settings = yaml.safe_load((run / "config.yaml").read_text()) | {"align": {"method": "dpo"}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": s, "data/pairs": 8, "rewards/accuracy": 0.75}) + "\n" for s in range(10))
    tiles = page([read_run(run)]).split('class="tiles"')[1].split("<h2>")[0]
    assert "<b>80</b><span>pairs seen</span>" in tiles and "<b>75.0%</b><span>accuracy now</span>" in tiles
    assert "target tokens" not in tiles


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=30))
def test_the_axis_of_bars_ends_at_a_number_above_all_of_them(values):
    svg = bar_chart("test", [str(i) for i in range(len(values))], {"one": values})
    tops = [float(y) for y in re.findall(r'<rect class="bar c0" x="[^"]+" y="([^"]+)"', svg)]
    lines = [float(y) for y in re.findall(r'<line class="grid" [^>]* y1="([^"]+)"', svg)]
    assert len(tops) == len(values) and min(tops) >= min(lines) - 0.11 and max(lines) == pytest.approx(230.0)


def test_one_noisy_step_at_the_end_does_not_bend_the_smoothed_line():
    values = [5.0, *[1.0 + step % 2 for step in range(200)], 9.0]
    raw, smooth = heights(line_chart("loss", [Series("one", list(enumerate(values)), 0)], "step", smooth=True))
    assert smooth - raw > 100  # of 218: it ends among its neighbours, far below the last point


@given(st.floats(1e-12, 1e14), st.sampled_from([1, -1]))
def test_numbers_keep_their_leading_digits(size, sign):
    text = number(sign * size)
    factor = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1], 1.0)
    assert float(text.rstrip("kMGT")) * factor == pytest.approx(sign * size, rel=1e-2)


@given(st.lists(st.one_of(st.none(), finite), min_size=1, max_size=3000))
def test_thinning_loses_no_extreme_and_no_gap(values):
    points = list(enumerate(values))
    kept = thin(points)
    assert len(kept) <= 2 * MAX_POINTS and [x for x, _ in kept] == sorted(x for x, _ in kept)
    there = [y for y in values if y is not None]
    assert (None in values) == any(y is None for _, y in kept)
    if there:
        assert {min(there), max(there)} <= {y for _, y in kept}


@given(st.lists(st.one_of(st.none(), finite), min_size=1, max_size=200).filter(lambda v: any(y is not None for y in v)))
def test_every_point_of_a_chart_is_in_the_picture(values):
    svg = line_chart("test", [Series("one", list(enumerate(values)), 0)], "step", smooth=True, zero=True)
    assert "nan" not in svg and "inf" not in svg.replace("information", "")
    for y in re.findall(r'c[xy]="(-?[\d.]+)"', svg):
        assert -5 <= float(y) <= 605
