"""Whatever the text and the settings: every record comes out whole, once, and nothing else does."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.format import PAD, TARGET, open_indexed
from megatron_mixcpt.data_prep.pipeline import preprocess
from megatron_mixcpt.data_prep.tokenizer import load_tokenizer
from tests.data_prep.helpers import load_mix, source_of

# Unicode text, some of it with control strings and line breaks of every sort.
PIECES = st.one_of(
    st.text(max_size=60), st.sampled_from(["<|endoftext|>", "\r\n", "\x00", "\u2028", " ", "<|im_start|>"])
)
TEXTS = st.lists(st.lists(PIECES, min_size=1, max_size=6).map("".join), min_size=1, max_size=12)


def usable(text: str) -> bool:
    return bool(text) and not text.isspace()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=TEXTS,
    answers=TEXTS,
    seq_length=st.integers(8, 80),
    layout=st.sampled_from(["pack", "concat"]),
    loss=st.sampled_from(["all", "answer"]),
    seed=st.integers(0, 99),
    share=st.sampled_from([0.0, 0.5]),
)
def test_every_record_is_stored_whole_and_once(tokenizer_dir, texts, answers, seq_length, layout, loss, seed, share):
    tokenizer = load_tokenizer(tokenizer_dir)
    asked = [{"q": f"{i}{text}", "a": answer} for i, (text, answer) in enumerate(zip(texts, answers))]
    with tempfile.TemporaryDirectory() as folder:
        docs, ask = Path(folder, "docs.jsonl"), Path(folder, "ask.jsonl")
        docs.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "at least this one"]))
        ask.write_text("".join(json.dumps(item) + "\n" for item in [*asked, {"q": "x", "a": "y"}]))
        base = {"max_bad_fraction": 1.0, "weight": 1}
        config = {
            "tokenizer": str(tokenizer_dir),
            "out": str(Path(folder, "out")),
            "seq_length": seq_length,
            "seed": seed,
            "valid_fraction": share,
            "exact_duplicates": "keep",
            "sources": [
                {**base, "name": "docs", "kind": "domain", "paths": [str(docs)], "text": "{text}", "layout": layout},
                {**base, "name": "ask", "kind": "instruction", "paths": [str(ask)], "prompt": "{q}", "response": "{a}"},
            ],
        }
        config["sources"][1]["loss"] = loss
        try:
            preprocess(parse_config(config))
        except Exception as error:  # with few records all may fall on the side of validation
            assert "has no training documents" in str(error) and share
            return
        out = Path(folder, "out")
        bad = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
        wanted = {
            "docs": {i + 1: text for i, text in enumerate([*texts, "at least this one"]) if usable(text)},
            "ask": {i + 1: (item["q"], item["a"]) for i, item in enumerate([*asked, {"q": "x", "a": "y"}])},
        }
        for name, want in wanted.items():
            rows = pq.read_table(out / "provenance" / f"{name}.parquet").to_pylist()
            quarantined = {item["line"] for item in bad if item["source"] == name}
            assert {row["line"] for row in rows} == set(want) - quarantined
            assert all(item["reason"] in ("empty", "too long") for item in bad)
            entry = source_of(load_mix(out), name)
            opened = {
                split: (
                    open_indexed(out / entry[split]["prefix"]),
                    open_indexed(out / f"{entry[split]['prefix']}.flags"),
                )
                for split in ("train", "valid")
                if entry[split]
            }
            for row in rows:
                tokens, flags = collect(row, *opened[row["split"]], seq_length)
                assert tokens[-1] == tokenizer.eos_id and not {0, 1, 2} & set(tokens[:-1].tolist())
                text = tokenizer.decode(tokens[:-1].tolist())
                if name == "docs":
                    assert text == want[row["line"]]
                else:
                    prompt, answer = want[row["line"]]
                    assert text == f"{prompt}\n{answer}"
                    learned = tokens[(flags & TARGET) != 0]
                    if loss == "answer":
                        assert tokenizer.decode(learned[:-1].tolist()) == answer
                    else:
                        assert len(learned) == len(tokens) - 1
            # Nothing but these documents is stored.
            stored = sum(int(((flags.tokens & PAD) == 0).sum()) for _, flags in opened.values())
            assert stored == sum(row["tokens"] for row in rows)


def collect(row: dict, tokens, flags, seq_length: int) -> tuple[np.ndarray, np.ndarray]:
    """A document put together from its pieces."""
    parts, left = [], row["tokens"]
    for sequence, position in zip(row["sequences"], row["positions"]):
        size = min(left, seq_length - position)
        parts.append((tokens[sequence][position : position + size], flags[sequence][position : position + size]))
        left -= size
    assert left == 0
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
