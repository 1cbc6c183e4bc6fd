"""The page of a certificate, or of what is off."""

from __future__ import annotations

from pathlib import Path

from megatron_mixcpt.certify.trial import Outcome
from megatron_mixcpt.convert.certificate import Certificate
from megatron_mixcpt.report.page import Cell, Page, Table, Text

PAGE = "certify.html"
KINDS = {
    "samples": "no sequence is trained on twice in a step",
    "copies": "what ranks should have alike is alike",
    "teacher": "the teacher's logits, or the reference's log-probabilities",
    "losses": "the loss of every token, or of every pair",
    "gradient": "the gradient of every parameter",
    "norm": "the gradient norm",
    "weights": "the weights after each optimizer step",
}


def write_page(certificate: Certificate, outcomes: list[Outcome], folder: Path) -> Path:
    """Write the page into `folder`; returns its path."""
    off = [deviation for outcome in outcomes for deviation in outcome.off]
    grid = " x ".join(f"{name} {size}" for name, size in certificate.grid.items())
    verdict = "certified" if not off else "not certified"
    page = Page("Certificate" if not off else "Not certified", f"{verdict} for {certificate.ranks} ranks")
    page.tiles(
        [
            ("comparisons", [f"{certificate.compared:,}"]),
            ("off", [str(len(off))]),
            ("processes", [grid]),
            ("device", [certificate.device]),
        ]
    )
    page.section(
        "Against the oracle",
        Text(
            "The trainer's own path on the grid with a small model of the same family, two steps, against transformers "
            "and textbook formulas in fp64 in one process. Bounds are multiples of the error that plain torch makes in "
            "the same dtype."
        ),
        Table(
            ["dtype", "what", "worst", "error", "bound"],
            [
                [str(row["dtype"]), KINDS[row["what"]], str(row["worst"]), f"{row['error']:.1e}", f"{row['bound']:.1e}"]
                for row in certificate.measured
            ],
        ),
    )
    for outcome in outcomes:
        if outcome.off:
            worst = sorted(outcome.off, key=lambda deviation: -deviation.share)
            rows: list[list[Cell]] = [
                [of.name, str(of.step + 1), f"{of.error:.2e}", f"{of.bound:.1e}", f"{of.factor:.4g}"] for of in worst
            ]
            head = ["what", "step", "error", "bound", "times what it should be"]
            page.section(f"Off in {outcome.dtype}", Text(f"{outcome.cause}."), Table(head, rows))
    versions: list[list[Cell]] = [[name, version] for name, version in certificate.versions.items()]
    features: list[list[Cell]] = [[name, str(value)] for name, value in certificate.features.items()]
    settings: list[list[Cell]] = [
        [f"{section}.{key}" if isinstance(values, dict) else section, str(value)]
        for section, values in certificate.settings.items()
        for key, value in (values.items() if isinstance(values, dict) else [("", values)])
    ]
    page.section("Versions", Table(["", "version"], versions))
    page.section("Model", Table(["feature", "value"], features))
    page.section("Settings", Table(["key", "value"], settings))
    page.section("No part of it", *(Text(line) for line in certificate.left_out))
    page.write(folder / PAGE)
    return folder / PAGE
