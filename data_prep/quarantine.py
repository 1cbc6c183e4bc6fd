"""Records that could not be used: written down with file, line and reason, and never more than the budget allows."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path

import orjson

from megatron_mixcpt.data_prep.config import SourceConfig
from megatron_mixcpt.data_prep.parts import Unusable
from megatron_mixcpt.data_prep.plan import Plan
from megatron_mixcpt.errors import BadRecordsError
from megatron_mixcpt.files import writing

FILE_NAME = "quarantine.jsonl"


def write_quarantine(out: Path, bad: list[tuple[Plan, list[Unusable]]]) -> Path:
    """Write all bad records, in the order of the sources and of their files."""
    path = out / FILE_NAME
    with writing(path) as file:
        for plan, items in bad:
            for item in items:
                row = {"source": plan.source, **asdict(item), "file": plan.files[item.file].path}
                file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    return path


class BadRecordWatch:
    """Ends a run whose bad records exceed the budget by far, long before the last of them.

    The number of records of a source is known only at the end; from the bytes that are done it is estimated. Twice the
    budget, and at least MANY of them, leave no doubt.
    """

    MANY = 100

    def __init__(self, source: SourceConfig, plan: Plan) -> None:
        self._fraction = source.max_bad_fraction
        self._total_bytes = max(1, sum(plan.chunk_bytes(chunk) for chunk in range(len(plan.chunks))))
        self._bytes = self._records = self._bad = 0

    def over(self, num_bytes: int, num_records: int, num_bad: int) -> bool:
        """Count a finished chunk; whether enough of the source has been seen."""
        self._bytes, self._records, self._bad = (
            self._bytes + num_bytes,
            self._records + num_records,
            self._bad + num_bad,
        )
        expected = self._records * self._total_bytes / max(1, self._bytes)
        return self._bad >= self.MANY and self._bad > 2 * self._fraction * expected


def check_lengths(source: SourceConfig, items: list[Unusable], plan: Plan, path: Path) -> None:
    """Raises BadRecordsError (exit code 4) for a record that does not fit where `too_long: error` stands."""
    long = [item for item in items if item.is_too_long]
    if long and source.too_long == "error":
        first = long[0]
        raise BadRecordsError(
            f"source {source.name}: {len(long)} records do not fit into seq_length (too_long: error), for example "
            f"{plan.files[first.file].path}:{first.line}: {first.detail}. All of them are in {path}; raise "
            "seq_length, or set too_long: drop or truncate"
        )


def check_budget(source: SourceConfig, num_records: int, items: list[Unusable], plan: Plan, path: Path) -> None:
    """Raises BadRecordsError (exit code 4) if more than `max_bad_fraction` of the records are bad."""
    items = [item for item in items if not item.is_too_long]
    if len(items) <= source.max_bad_fraction * num_records:
        return
    reason, count = Counter(item.reason for item in items).most_common(1)[0]
    example = next(item for item in items if item.reason == reason)
    raise BadRecordsError(
        f"source {source.name}: {len(items)} of {num_records} records are bad, the budget is "
        f"{source.max_bad_fraction:.2%} (max_bad_fraction). Most frequent: {reason} ({count}), for example "
        f"{plan.files[example.file].path}:{example.line}: {example.detail}. All of them are in {path}"
    )
