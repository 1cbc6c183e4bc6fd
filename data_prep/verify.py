"""Whether a result is what its manifest says: every file, flag and boundary, and a sample taken back to its source."""

import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megatron_mixcpt.data_prep.assemble import content_hash, flags_prefix
from megatron_mixcpt.data_prep.findings import Findings
from megatron_mixcpt.data_prep.format import (
    DOC_START,
    KIND_CHOSEN,
    KIND_HIGH,
    KIND_INSTRUCTION,
    KIND_REJECTED,
    PAD,
    TARGET,
    TEXT_KINDS,
    Indexed,
    kind_of,
    open_indexed,
    token_dtype,
)
from megatron_mixcpt.data_prep.manifest import FileEntry, Manifest, read_manifest
from megatron_mixcpt.data_prep.mix import Mix, Source, Split, TokenizerEntry, read_mix
from megatron_mixcpt.data_prep.parts import hash_file
from megatron_mixcpt.errors import MixcptError

BLOCK_TOKENS = 1 << 20  # looked at together; small enough for the cache
KINDS = {
    **{name: {number} for name, number in TEXT_KINDS.items()},
    "instruction": {KIND_INSTRUCTION},
    "preference": {KIND_CHOSEN, KIND_REJECTED},
}


def verify(folder: str | Path, *, sample: int = 64, workers: int = 1) -> Findings:
    """Check the result in `folder` (or of a mix.json).

    Args:
        sample: records to take back to their source and tokenize again with the reference engine; 0: none.
        workers: threads.

    Raises VerificationError for a mix.json that was tampered with, MixcptError if there is none.
    """
    mix = read_mix(folder)
    out = mix.folder
    findings = Findings()
    manifest = read_manifest(out)
    began = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        names = list(manifest.files)
        checks = pool.map(lambda name: _check_file(out, name, manifest.files[name]), names)
        for problem, size in checks:
            findings.num_files += 1
            findings.num_bytes += size
            findings.problems += problem
        for problems in pool.map(lambda item: _check_prefix(mix, manifest, *item), mix.prefixes):
            findings.problems += problems
    findings.seconds = time.monotonic() - began
    for _, _, split in mix.prefixes:
        findings.num_prefixes += 1
        findings.num_tokens += split.tokens
    _check_weights(mix, findings)
    leftover = sorted(path.name for path in out.glob("*.bin") if path.name not in manifest.files)
    if leftover:
        findings.notes.append(
            f"{len(leftover)} .bin files are left over from earlier runs, e.g. {leftover[0]}: this mix.json does not "
            "need them; once no run trains on what it was before, and no part of it made by `mixcpt mix`, remove them "
            "with the .idx and flags of the same names"
        )
    _check_with_megatron(mix, findings)
    if sample and not findings.problems:
        from megatron_mixcpt.data_prep.trace import trace_sample

        trace_sample(out, mix, manifest, sample, findings)
    return findings


def _check_file(out: Path, name: str, wanted: FileEntry) -> tuple[list[str], int]:
    path = out / name
    if not path.is_file():
        return [f"{name} is missing"], 0
    size = path.stat().st_size
    if size != wanted.size:
        return [f"{name} has {size} bytes, the manifest says {wanted.size}"], size
    if hash_file(path) != wanted.hash:
        return [f"{name} has changed: its hash is not the one in the manifest"], size
    return [], size


def _check_prefix(mix: Mix, manifest: Manifest, source: Source, split_name: str, split: Split) -> list[str]:
    name = split.prefix.name
    entries = [manifest.files.get(name + ending) for ending in (".bin", ".flags.bin")]
    listed = [entry.hash if entry else "" for entry in entries]
    pairs = split_name.startswith("pairs/")
    shape = f"view {split.index_hash}" if split.index_hash else "pairs" if pairs else str(mix.seq_length)
    problems = []
    if content_hash(listed, shape) != split.content:
        problems.append(f"{name}: the hash in mix.json does not belong to the files in the manifest")
    if not name.endswith(split.content[:12]):
        problems.append(f"{name}: its name does not hold its hash")
    try:
        tokens, flags = open_indexed(split.prefix), open_indexed(flags_prefix(split.prefix))
    except MixcptError as error:
        return [*problems, str(error)]
    if tokens.dtype != token_dtype(mix.vocab_size) or flags.dtype != np.uint8:
        return [*problems, f"{name}: wrong dtype {tokens.dtype}/{flags.dtype}"]
    if not np.array_equal(tokens.lengths, flags.lengths) or not np.array_equal(tokens.documents, flags.documents):
        return [*problems, f"{name}: tokens and flags are cut differently"]
    if not np.array_equal(tokens.pointers, flags.pointers * tokens.dtype.itemsize):
        return [*problems, f"{name}: tokens and flags point to different places"]
    if len(tokens) != split.sequences:
        return [*problems, f"{name}: {len(tokens)} sequences, mix.json says {split.sequences}"]
    check = _check_pairs if pairs else _check_packed
    return [*problems, *(f"{name}: {problem}" for problem in check(tokens, flags, mix, source, split))]


def _check_packed(tokens: Indexed, flags: Indexed, mix: Mix, source: Source, split: Split) -> Iterator[str]:
    """Every sequence has exactly seq_length tokens; the flags keep their rules; the counts are those of mix.json."""
    length = mix.seq_length
    if not (tokens.lengths == length).all():
        yield f"not every sequence has {length} tokens"
        return
    if not np.array_equal(tokens.documents, np.arange(len(tokens) + 1)):
        yield "not every sequence is a document of its own"
    num_tokens = num_targets = 0
    step = max(1, BLOCK_TOKENS // length)
    starts = flags.pointers
    for first in range(0, len(tokens), step):
        rows = starts[first : first + step]
        ids, marks = _rows(tokens, rows, length), _rows(flags, rows, length)
        pad = marks & PAD
        problem = _broken_rule(ids, marks, pad, source.kind, mix.tokenizer)
        if problem:
            yield f"sequences {first} to {first + len(rows) - 1}: {problem}"
            return
        num_tokens += marks.size - int(np.count_nonzero(pad))
        num_targets += int(np.count_nonzero(marks & TARGET))
    if (num_tokens, num_targets) != (split.tokens, split.target_tokens):
        yield (f"{num_tokens} tokens and {num_targets} targets, mix.json says {split.tokens} and {split.target_tokens}")


def _rows(indexed: Indexed, starts: np.ndarray, length: int) -> np.ndarray:
    """Sequences [n, length] that begin at the tokens `starts`; no copy where they lie in a row."""
    if len(starts) and starts[-1] - starts[0] == (len(starts) - 1) * length and (np.diff(starts) == length).all():
        return indexed.tokens[starts[0] : starts[0] + len(starts) * length].reshape(-1, length)
    return np.stack([indexed.tokens[start : start + length] for start in starts.tolist()])


def _broken_rule(
    ids: np.ndarray, marks: np.ndarray, pad: np.ndarray, kind: str, tokenizer: TokenizerEntry
) -> str | None:
    if int(ids.max(initial=0)) >= tokenizer.vocab_size or int(ids.min(initial=0)) < 0:
        return "a token id is outside the vocabulary"
    seen = np.flatnonzero(np.bincount(marks.reshape(-1), minlength=256)).astype(np.uint8)
    if (seen & KIND_HIGH).any() and max(KINDS[kind]) < 0b100:
        return "a flag bit is set that has no meaning"
    if ((seen & DOC_START != 0) & (seen & TARGET != 0)).any():
        return "the first token of a document is a target"
    if ((seen & PAD != 0) & (seen & TARGET != 0)).any():
        return "padding is a target"
    if not set(kind_of(seen[seen & PAD == 0]).tolist()) <= KINDS[kind]:
        return f"a token is not of a kind that a {kind} source has"
    if not (marks[:, 0] & DOC_START).all():
        return "a sequence does not begin with a document"
    if pad[:, -1].any():
        padded = np.flatnonzero(pad[:, -1])
        tail = pad[padded] != 0
        begin = tail.argmax(axis=1)
        column = np.arange(pad.shape[1])
        if (tail != (column >= begin[:, None])).any():
            return "padding is not only at the end"
        if not (marks[padded, begin] & DOC_START).all():
            return "padding does not begin as a document of its own"
        if (ids[padded][tail] != tokenizer.pad_id).any():
            return "padding holds a token that is not the padding token"
    if int(np.count_nonzero(pad)) != int(np.count_nonzero(pad[pad[:, -1] != 0])):
        return "padding is not only at the end"
    return None


def _check_pairs(tokens: Indexed, flags: Indexed, mix: Mix, source: Source, split: Split) -> Iterator[str]:
    """Two sequences a document: chosen and rejected, the same prompt before both answers."""
    if not np.array_equal(tokens.documents, np.arange(0, len(tokens) + 1, 2)):
        yield "not every document has two sequences"
        return
    num_targets = 0
    for index in range(0, len(tokens), 2):
        prompts = []
        for row, kind in ((index, KIND_CHOSEN), (index + 1, KIND_REJECTED)):
            marks = flags[row]
            target = (marks & TARGET) != 0
            num_targets += int(target.sum())
            if len(marks) > mix.seq_length or not target.any() or target[0]:
                yield f"sequence {row}: no answer, or longer than seq_length"
                return
            if not marks[0] & DOC_START or (kind_of(marks) != kind).any():
                yield f"sequence {row}: wrong kind or no document start"
                return
            prompts.append(tokens[row][: int(target.argmax())])
        if not np.array_equal(prompts[0], prompts[1]):
            yield f"sequences {index} and {index + 1} have different prompts"
            return
    if (int(tokens.lengths.sum(dtype=np.int64)), num_targets) != (split.tokens, split.target_tokens):
        yield "the counts are not those of mix.json"


def _check_weights(mix: Mix, findings: Findings) -> None:
    total = sum(source.weight for source in mix.sources)
    if abs(total - 1) > 1e-9:
        findings.problems.append(f"the weights in mix.json sum to {total}, not to 1")


def _check_with_megatron(mix: Mix, findings: Findings) -> None:
    """Megatron's own reader must see what ours sees."""
    try:
        with warnings.catch_warnings():  # megatron-core complains about missing optional packages
            warnings.simplefilter("ignore")
            from megatron.core.datasets.indexed_dataset import IndexedDataset
    except ImportError:
        findings.notes.append("megatron-core is not installed here: its own reader was not tried")
        return
    for _, _, split in mix.prefixes:
        for prefix in (split.prefix, flags_prefix(split.prefix)):
            try:
                ours, theirs = open_indexed(prefix), IndexedDataset(str(prefix))
            except Exception as error:
                findings.problems.append(f"{prefix.name}: megatron-core cannot open it: {error}")
                continue
            same = np.array_equal(ours.lengths, theirs.sequence_lengths)
            same = same and np.array_equal(ours.documents, theirs.document_indices)
            for index in {0, len(ours) // 2, len(ours) - 1}:
                same = same and np.array_equal(ours[index], theirs[index])
            if not same:
                findings.problems.append(f"{prefix.name}: megatron-core reads something else than we do")
