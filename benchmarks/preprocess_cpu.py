"""Preprocessing against the classic pipeline, in one run on one machine: python benchmarks/preprocess_cpu.py --help

The classic pipeline is what Megatron's own tool does, written anew: a process pool encodes line by line with Hugging
Face tokenizers and sends lists of ids to the parent, which feeds megatron-core's IndexedDatasetBuilder.
Wall time is what a user waits; CPU time (all processes) is what stays comparable when other programs share the machine.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
EOS = "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="JSON lines with a key `text` (default: Python's standard library)")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", default="preprocess", help="of the files in benchmarks/results")
    parser.add_argument("--stage", choices=("classic", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engine", default="auto", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage == "classic":
        classic(args.work, args.workers)
    elif args.stage == "ours":
        ours(args.work, args.workers, args.engine)
    else:
        with tempfile.TemporaryDirectory(prefix="bench-preprocess-") as folder:
            report(args, measure(args, Path(folder)))


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    num_bytes, num_documents = write_corpus(work / "corpus.jsonl", args.text, args.megabytes * 10**6)
    train_tokenizer(work / "corpus.jsonl", work / "tokenizer.json")
    found: dict[str, Any] = {"bytes": num_bytes, "documents": num_documents, "runs": {}}
    for name, stage, engine in (
        ("classic", "classic", ""),
        ("reference", "ours", "reference"),
        ("fast", "ours", "auto"),
    ):
        command = [sys.executable, __file__, "--stage", stage, "--work", str(work), "--engine", engine]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.monotonic()
        done = subprocess.run([*command, "--workers", str(args.workers)], check=True, stdout=subprocess.PIPE, text=True)
        wall = time.monotonic() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        run = {"wall": wall, "cpu": cpu, **json.loads(done.stdout.splitlines()[-1])}
        found["runs"][name] = run
        print(f"{name}: {wall:.1f} s, {num_bytes / wall / 1e6:.1f} MB/s, {cpu:.1f} s of CPU", flush=True)
    found["identical"] = {name: same_tokens(work, name) for name in ("reference", "fast")}
    found["verify"] = verify_speed(work / "auto")
    found["packing"] = packing_speed()
    found["shuffle"] = shuffle_cost(work)
    return found


def write_corpus(path: Path, text: Path | None, num_bytes: int) -> tuple[int, int]:
    """Real documents, repeated with 2 % of the words of each swapped so that no two are alike."""
    if text is not None:
        documents = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").split("\n") if line]
    else:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))
        documents = [
            file.read_text(encoding="utf-8", errors="ignore") for file in files if "site-packages" not in file.parts
        ]
    documents = [document for document in documents if document.strip()]
    rng = random.Random(0)
    written = count = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < num_bytes:
            words = rng.choice(documents).split(" ")
            for _ in range(max(1, len(words) // 100)):
                i, j = rng.randrange(len(words)), rng.randrange(len(words))
                words[i], words[j] = words[j], words[i]
            line = json.dumps({"text": f"{count} " + " ".join(words)}, ensure_ascii=False) + "\n"
            file.write(line)
            written += len(line.encode())
            count += 1
    return written, count


def train_tokenizer(corpus: Path, path: Path) -> None:
    """A byte-level BPE with GPT-2's pre-tokenization and vocabulary size, trained on a part of the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=50257,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with open(corpus, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(6000))]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


_encoder: Any = None


def _start_encoder(path: str) -> None:
    global _encoder
    from tokenizers import Tokenizer

    _encoder = Tokenizer.from_file(path)


def _encode_line(line: str) -> tuple[list[int], int]:
    ids = _encoder.encode(json.loads(line)["text"], add_special_tokens=False).ids
    ids.append(_encoder.token_to_id(EOS))
    return ids, len(line)


def classic(work: Path, workers: int) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    builder = IndexedDatasetBuilder(str(work / "classic.bin"), dtype=np.uint16)
    with open(work / "corpus.jsonl", encoding="utf-8") as file:
        with multiprocessing.Pool(
            workers, initializer=_start_encoder, initargs=(str(work / "tokenizer.json"),)
        ) as pool:
            for ids, _ in pool.imap(_encode_line, file, 32):
                builder.add_item(torch.IntTensor(ids))
                builder.end_document()
    builder.finalize(str(work / "classic.idx"))
    print(json.dumps({"worker_mb": _peak_of_children()}))


def config_values(work: Path, engine: str) -> dict[str, Any]:
    return {
        "tokenizer": str(work / "tokenizer.json"),
        "eos_token": EOS,
        "out": str(work / engine),
        "seq_length": 4096,
        "exact_duplicates": "keep",  # the classic pipeline has no such step
        "engine": engine,
        "sources": [
            {"name": "text", "kind": "domain", "paths": [str(work / "corpus.jsonl")], "text": "{text}", "weight": 1}
        ],
    }


def ours(work: Path, workers: int, engine: str) -> None:
    from megatron_mixcpt.data_prep.config import parse_config
    from megatron_mixcpt.data_prep.pipeline import preprocess

    preprocess(parse_config(config_values(work, engine)), workers=workers)
    print(json.dumps({"worker_mb": _peak_of_children()}))


def _peak_of_children() -> float:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def same_tokens(work: Path, name: str) -> bool:
    """Whether our documents, in the order of the input, are byte for byte the `.bin` of the classic pipeline."""
    from megatron_mixcpt.data_prep.config import parse_config
    from megatron_mixcpt.data_prep.pipeline import load_parts

    (corpus,) = load_parts(parse_config(config_values(work, {"fast": "auto"}.get(name, name))))
    mapped = np.memmap(work / "classic.bin", dtype=np.uint16, mode="r")
    position = 0
    for block in corpus.blocks:
        size = len(block.tokens)
        if not np.array_equal(block.tokens, mapped[position : position + size]):
            return False
        position += size
    return position == len(mapped)


def verify_speed(folder: Path) -> float:
    """MB/s of `mixcpt verify` over files, hashes and flags."""
    from megatron_mixcpt.data_prep.verify import verify

    findings = verify(folder, sample=0, workers=len(os.sched_getaffinity(0)))
    assert not findings.problems, findings.problems
    return findings.num_bytes / findings.seconds / 1e6


def packing_speed() -> dict[str, float]:
    from megatron_mixcpt.data_prep.packing import best_fit

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.2, 1.0, size=1_000_000).astype(np.int64), 1, 4096)
    began = time.monotonic()
    bins, count = best_fit(lengths, 4096)
    seconds = time.monotonic() - began
    assert np.bincount(bins, weights=lengths).max() <= 4096
    return {"seconds": seconds, "fill": float(lengths.sum() / (count * 4096))}


def shuffle_cost(work: Path) -> dict[str, float]:
    """CPU seconds to write the prefix with and without the global shuffle of documents and sequences (best of 3)."""
    from megatron_mixcpt.data_prep import assemble
    from megatron_mixcpt.data_prep.config import parse_config
    from megatron_mixcpt.data_prep.pipeline import load_parts

    config = parse_config(config_values(work, "auto"))
    (corpus,) = load_parts(config)
    rows = np.arange(len(corpus.documents))
    found = {}
    for name, shuffle in (("without", False), ("with", True)):
        times = []
        for _ in range(3):
            began = time.process_time()
            placement = assemble.place(corpus, rows, config.sources[0], 4096, 1, "train", shuffle=shuffle)
            assemble.write_prefix(work / "x", corpus, placement, seq_length=4096, dtype=np.dtype("<u2"), pad_id=0)
            times.append(time.process_time() - began)
        found[name] = min(times)
    return found


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "fastokens", "megatron-core"))
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, {packages}"


def report(args: argparse.Namespace, found: dict[str, Any]) -> None:
    runs, base = found["runs"], found["runs"]["classic"]
    what = f"{found['bytes'] / 1e6:.0f} MB of JSON lines, {found['documents']} documents, {args.workers} workers"
    lines = [
        "# Preprocessing",
        "",
        f"`python benchmarks/preprocess_cpu.py`: {what}; byte-level BPE of 50,257 entries. {machine()}.",
        f"Load average at the end: {os.getloadavg()[0]:.1f}.",
        "Where other programs share the machine, rows met different loads: then compare CPU times, not wall times.",
        "",
        "| pipeline | wall s | MB/s | x classic | CPU s | x classic (CPU) | peak worker MB | tokens identical |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = {
        "classic": "classic: pool, tokenizers, official builder",
        "reference": "ours, Hugging Face engine",
        "fast": "ours, fast engine",
    }
    for name, run in runs.items():
        same = {True: "yes", False: "NO"}[found["identical"][name]] if name != "classic" else "-"
        lines.append(
            f"| {names[name]} | {run['wall']:.1f} | {found['bytes'] / run['wall'] / 1e6:.1f} | "
            f"{base['wall'] / run['wall']:.1f} | {run['cpu']:.1f} | {base['cpu'] / run['cpu']:.1f} | "
            f"{run['worker_mb']:.0f} | {same} |"
        )
    shuffle, packing = found["shuffle"], found["packing"]
    share = (shuffle["with"] - shuffle["without"]) / runs["fast"]["cpu"]
    lines += [
        "",
        "Ours also verifies the engine, splits, shuffles, packs to 4096 tokens, writes flags, provenance and hashes.",
        "",
        "| claim | measured |",
        "|---|---|",
        f"| pack 1 M documents to 4096 | {packing['seconds']:.2f} s, {packing['fill']:.4%} full |",
        f"| verify | {found['verify']:.0f} MB/s |",
        f"| global shuffle | {shuffle['with']:.2f} s of CPU against {shuffle['without']:.2f} s in input order: "
        f"{share:+.1%} of the whole run |",
        "",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.md").write_text("\n".join(lines))
    (RESULTS / f"{args.name}.json").write_text(json.dumps(found, indent=2) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
