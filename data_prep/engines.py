"""Engines that turn plain text into token ids, and the check that lets a fast one run in place of the reference."""

import random
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np


class Engine(Protocol):
    """Turns plain text into token ids, never into control tokens."""

    name: str

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts in a row (uint32 [T]) and where each text starts and ends (int64 [len(texts) + 1])."""
        ...


class HuggingFaceEngine:
    """The `tokenizers` library: the reference for everything that has a tokenizer.json."""

    name = "huggingface"

    def __init__(self, backend: Any) -> None:
        """`backend`: a tokenizers.Tokenizer with encode_special_tokens set."""
        self._backend = backend

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return _flatten([encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)])


class SentencePieceEngine:
    """The `sentencepiece` library. Its encoder never yields control pieces from text."""

    name = "sentencepiece"

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return _flatten(self._processor.encode(texts, out_type=int, num_threads=1))


class FastEngine:
    """The `fastokens` library: many times quicker, used only after it agreed with the reference.

    It refuses some texts that the reference takes (bytes that a vocabulary has no token for). Those, and only those, go
    to the reference.
    """

    name = "fastokens"

    def __init__(self, definition: str, reference: Engine) -> None:
        """`definition`: the text of a tokenizer.json. Raises whatever the library raises for one it does not know."""
        import fastokens

        self._backend = fastokens.Tokenizer.from_json_str(definition)
        self._reference = reference
        self.num_refused = 0

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        try:
            ids, offsets = self._backend.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
            return np.frombuffer(ids, dtype="<u4"), np.frombuffer(offsets, dtype="<u8").astype(np.int64)
        except ValueError:
            if len(texts) == 1:
                self.num_refused += 1
                return self._reference.encode(texts)
        # Halve until the refused text is alone: a few quick calls, whatever the size of the batch.
        half = len(texts) // 2
        first, first_at = self.encode(texts[:half])
        second, second_at = self.encode(texts[half:])
        return np.concatenate([first, second]), np.concatenate([first_at, second_at[1:] + first_at[-1]])


def _flatten(ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(one) for one in ids], out=offsets[1:])
    flat = np.empty(int(offsets[-1]), dtype=np.uint32)
    for start, one in zip(offsets.tolist(), ids):
        flat[start : start + len(one)] = one
    return flat, offsets


def first_difference(reference: Engine, other: Engine, texts: Iterable[str]) -> str | None:
    """The first text that the two engines encode differently, or None."""
    batch = list(texts)
    ours, ours_at = reference.encode(batch)
    theirs, theirs_at = other.encode(batch)
    if np.array_equal(ours_at, theirs_at) and np.array_equal(ours, theirs):
        return None
    for index, text in enumerate(batch):
        mine = ours[ours_at[index] : ours_at[index + 1]]
        if not np.array_equal(mine, theirs[theirs_at[index] : theirs_at[index + 1]]):
            return text
    return None


def adversarial_texts(control: Iterable[str], count: int = 300) -> list[str]:
    """Texts on which tokenizers tend to disagree: odd white space, scripts, marks, control strings. Always the same."""
    fixed = [
        "",
        " ",
        "  leading and trailing  ",
        "\t\ttabs\tand\r\nlines\r\r\n\n\n",
        "a\u00a0b\u2003c\u3000d\u200be\ufefff\u2028g\u0085h",
        "I'm you're THEY'LL won't 'tis ’quoted’ it's'S",
        "0 12 123 1234567890 3.14159 1e-10 0x1F ½ ² ٣ ७",
        "naïve café co\u0302te Å A\u030a ﬁ ﬀ ẞ İ ı ǅ",
        "日本語 中文字符 한국어 \u1112\u1161\u11ab العربية עברית ไทย हिन्दी",
        "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 \U0001f9d1\u200d\U0001f680",
        "\x00\x01\x02\x07\x1b[31m\x7f\x80\x9f",
        "\ud7ff\ue000\uf8ff\ufffd\uffff\U0010ffff",
        "a" * 3000,
        " " * 500 + "x" + "\n" * 500,
        "ab" * 700 + "!?" * 300,
        "def f(x):\n    return {'k': [x**2 for _ in range(10)]}  # …\n",
        "<s> </s> [INST] <<SYS>> ▁▁ <0x0A> Ġ Ċ",
    ]
    names = [name for name in control if name]
    fixed += [f"x{name}y {name} {name}{name}" for name in names[:50]]
    rng = random.Random(20240410)
    ranges = [(0x20, 0x7E), (0x20, 0x7E), (0x00, 0xFF), (0x300, 0x36F), (0x400, 0x4FF), (0x600, 0x6FF)]
    ranges += [
        (0x900, 0x97F),
        (0x2000, 0x206F),
        (0x3040, 0x30FF),
        (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A3),
        (0x1F300, 0x1FAFF),
    ]
    for _ in range(count):
        chosen = rng.choices(ranges, k=rng.randint(1, 3))
        length = rng.randint(1, 60)
        fixed.append("".join(chr(rng.randint(*rng.choice(chosen))) for _ in range(length)))
    return fixed


def load_fast_engine(definition: str | None, reference: Engine) -> FastEngine | str:
    """The fast engine for a tokenizer.json, or the reason in words why there is none."""
    if definition is None:
        return "there is none for this kind of tokenizer"
    try:
        return FastEngine(definition, reference)
    except ImportError:
        return "the package fastokens is not installed"
    except Exception as error:  # whatever it cannot read
        return f"fastokens does not know this tokenizer ({error})"


def disagreement(reference: Engine, fast: Engine, texts: Iterable[str]) -> str | None:
    """Why `fast` must not run on such texts, in words; None if it gives exactly what the reference gives."""
    try:
        difference = first_difference(reference, fast, texts)
    except Exception as error:
        return f"{fast.name} failed on a sample ({error})"
    return None if difference is None else f"{fast.name} differs from the reference on {difference[:60]!r}"
