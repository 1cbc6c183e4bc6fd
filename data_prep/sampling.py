"""A few real texts of a source, taken here and there, for checks that come before the work."""

from collections.abc import Iterator

from megatron_mixcpt.data_prep.plan import Plan
from megatron_mixcpt.data_prep.readers import read_span
from megatron_mixcpt.data_prep.records import Renderer
from megatron_mixcpt.data_prep.template import BadRecord

SAMPLE_CHUNKS = 4
SAMPLE_CHARACTERS = 32_000  # of each chunk


def sample_texts(plan: Plan, render: Renderer, max_record_bytes: int, keys: list[str]) -> Iterator[str]:
    """Texts from the beginnings of a few chunks spread over the source; always the same for the same plan."""
    count = len(plan.chunks)
    for chunk in sorted({count * i // SAMPLE_CHUNKS for i in range(SAMPLE_CHUNKS)} if count else ()):
        left = SAMPLE_CHARACTERS
        span = plan.chunks[chunk][0]
        for _, record in read_span(plan.files[span.file], span, max_record_bytes, keys):
            if isinstance(record, BadRecord):
                continue
            try:
                documents = render(record)
            except BadRecord:
                continue
            for document in documents:
                for content, _ in document.pieces:
                    if isinstance(content, str):
                        yield content[:SAMPLE_CHARACTERS]
                        left -= len(content)
            if left <= 0:
                break
