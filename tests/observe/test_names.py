"""Every metric has its place in the documentation."""

from pathlib import Path

from megatron_mixcpt.observe.names import METRICS, documented, table

PAGE = Path(__file__).parents[2] / "docs" / "observability.md"


def test_the_page_lists_every_metric_as_the_code_does():
    written = PAGE.read_text().split("<!-- metrics -->\n")[1].split("<!-- /metrics -->")[0]
    assert written == table() + "\n", "put the output of megatron_mixcpt.observe.names.table() between the marks"


def test_a_source_may_have_any_name_but_no_slash():
    assert documented("train/ce/web crawl (2024)") and documented("val/facts/ppl") and documented("optim/lr")
    assert not documented("train/ce/a/b") and not documented("val//ppl") and not documented("optim/lr2")
    assert all(documented(name) for name in METRICS)
