"""Table and plot of the GPU benchmark, from its records."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    tokens: int
    vocab: int
    dtype: str
    temperature: float
    masked: int  # percent of the tokens

    @property
    def label(self) -> str:
        return f"{self.tokens} x {self.vocab} {self.dtype}, tau {self.temperature:g}, {self.masked} % masked"

    @property
    def floor_bytes(self) -> int:
        """What has to move: read both, read both again, write one; tokens that are masked are only written."""
        size = {"fp32": 4, "bf16": 2}[self.dtype]
        read = self.tokens * (100 - self.masked) // 100
        return size * self.vocab * (4 * read + self.tokens)


@dataclass(frozen=True)
class Record:
    """One contender in one case; times in ms, memory in MiB beyond the inputs, None where it did not run."""

    case: Case
    name: str
    work: str
    forward: float | None
    both: float | None
    memory: float | None = None
    loss_error: float | None = None
    gradient_error: float | None = None
    note: str = ""

    @property
    def bandwidth(self) -> float | None:
        """GB/s of the bytes that have to move."""
        return self.case.floor_bytes / self.both / 1e6 if self.both else None


def number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def table(records: Iterable[Record], copy_bandwidth: float) -> str:
    """Markdown; `copy_bandwidth` in GB/s, measured in the same run."""
    header = (
        "contender", "computes", "forward ms", "backward ms", "both ms", "GB/s of the floor", "share of copy",
        "MiB beyond inputs", "loss error", "gradient error", "",
    )  # fmt: skip
    lines: list[str] = []
    case = None
    for r in records:
        if r.case != case:
            case = r.case
            lines += ["", f"### {case.label}", "", _row(header), _row(["---"] * len(header))]
        backward = r.both - r.forward if r.both is not None and r.forward is not None else None
        share = r.bandwidth / copy_bandwidth if r.bandwidth is not None else None
        values = [r.forward, backward, r.both, r.bandwidth, share, r.memory, r.loss_error, r.gradient_error]
        lines.append(_row([r.name, r.work, *map(number, values), r.note]))
    return "\n".join(lines).strip()


def aims(records: list[Record], copy_bandwidth: float) -> str:
    """The aims of the project for each case in which ours and its rivals ran."""
    header = ("case", "share of copy (aim 0.85)", "eager / ours (aim 10)", "best peer on logits / ours (aim 1.4)")
    lines = [_row(header), _row(["---"] * len(header))]
    for case in dict.fromkeys(record.case for record in records):
        times = {r.name: r.both for r in records if r.case == case and r.both}
        work = {r.name: r.work for r in records}
        if "ours" not in times:
            continue
        peers = [ms for name, ms in times.items() if name not in ("ours", "eager") and work[name] != "CE"]
        bandwidth = case.floor_bytes / times["ours"] / 1e6
        eager = times["eager"] / times["ours"] if "eager" in times else None
        best = min(peers) / times["ours"] if peers else None
        lines.append(_row([case.label, number(bandwidth / copy_bandwidth), number(eager), number(best)]))
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def plot(records: list[Record], copy_bandwidth: float, path: Path) -> None:
    """Time against tokens (at the vocabulary in the middle) and bandwidth against vocabulary (at the most tokens)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plain = [r for r in records if r.both and r.work != "CE" and r.case.masked == 0]
    plain = [r for r in plain if (r.case.dtype, r.case.temperature) == (plain[0].case.dtype, plain[0].case.temperature)]
    vocabs = sorted({r.case.vocab for r in plain})
    vocab, tokens = vocabs[len(vocabs) // 2], max(r.case.tokens for r in plain)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for name in dict.fromkeys(r.name for r in plain):
        mine = [r for r in plain if r.name == name]
        at_vocab = sorted((r.case.tokens, r.both) for r in mine if r.case.vocab == vocab)
        at_tokens = sorted((r.case.vocab, r.bandwidth) for r in mine if r.case.tokens == tokens)
        left.plot(*zip(*at_vocab), marker="o", label=name) if at_vocab else None
        right.plot(*zip(*at_tokens), marker="o", label=name) if at_tokens else None
    left.set(
        xscale="log", yscale="log", xlabel="tokens", ylabel="ms, forward and backward", title=f"vocabulary {vocab}"
    )
    right.axhline(copy_bandwidth, color="grey", linestyle="--", label="copy")
    right.set(xscale="log", xlabel="vocabulary", ylabel="GB/s of the bytes that have to move", title=f"{tokens} tokens")
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
