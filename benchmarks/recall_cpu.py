"""What drawing rehearsal data costs on CPU against plain `model.generate`, one sample after the other; what is kept.

    python -m benchmarks.recall_cpu [--samples 64] [--alone 8] [--out benchmarks/results/recall_cpu.md]

SmolLM2-135M-Instruct (as `make demo` unpacks it), fp32, one thread. Both draw the same kinds of samples in one process;
the ratio is one of CPU seconds a token, which other work on the machine does not count in.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import orjson
import torch

import megatron_mixcpt
from megatron_mixcpt.config import validate
from megatron_mixcpt.demo.base_model import save_smollm2
from megatron_mixcpt.evaluate.loading import load_directory, quiet_libraries
from megatron_mixcpt.recall.asking import Asker
from megatron_mixcpt.recall.config import RecallConfig
from megatron_mixcpt.recall.run import recall

EXAMPLES = 5  # a stream
CHARACTERS = 300


def configuration(model: Path, out: Path, samples: int) -> RecallConfig:
    """Half instructions, half text."""
    values = {
        "model": {"hf": str(model)},
        "out": str(out),
        "n": {"instructions": samples // 2, "text": samples // 2},
        "engine": {"transformers": {"batch_size": 32, "block_size": 32, "dtype": "fp32", "threads": 1}},
        "text": {"start_token": "<|endoftext|>"},
        "sampling": {"max_instruction_tokens": 96, "max_answer_tokens": 128, "max_text_tokens": 128},
    }
    return validate(RecallConfig, values, "benchmark")


@torch.inference_mode()
def alone(config: RecallConfig, model: Any, asker: Asker, samples: int) -> tuple[int, float]:
    """Tokens and CPU seconds of `samples` samples by `model.generate`, half of each stream."""
    torch.manual_seed(0)
    limits, tokens, began = config.sampling, 0, time.process_time()

    def more(prompt: list[int], limit: int, ends: frozenset[int], temperature: float) -> list[int]:
        nonlocal tokens
        row = torch.tensor([prompt])
        made = model.generate(
            row,
            attention_mask=torch.ones_like(row),
            do_sample=True,
            temperature=temperature,
            top_p=limits.top_p,
            top_k=0,
            max_new_tokens=limit,
            eos_token_id=sorted(ends),
            pad_token_id=asker.tokenizer.pad_token_id,
        )[0, len(prompt) :].tolist()
        tokens += len(made)
        return made

    for number in range(samples // 2):
        ask = asker.ask("instructions", number)
        made = more(ask.tokens, limits.max_instruction_tokens, asker.ends_of("instructions", 0), ask.temperature)
        if made[-1] in asker.ends_of("instructions", 0):
            prompt = asker.answer_tokens(asker.decode(made[:-1]))
            more(prompt, limits.max_answer_tokens, asker.ends_of("instructions", 1), ask.temperature)
        ask = asker.ask("text", number)
        more(ask.tokens, limits.max_text_tokens, asker.ends_of("text", 0), ask.temperature)
    return tokens, time.process_time() - began


def drawn_tokens(out: Path) -> int:
    """All that were drawn, kept or not, ending tokens too."""
    lines = [line for path in out.glob(".samples/*/*.jsonl") for line in path.read_bytes().splitlines()[1:]]
    return sum(len(piece["logprobs"]) for line in lines for piece in orjson.loads(line)["parts"])


def examples(out: Path, stream: str) -> list[str]:
    """The first samples that were kept, as they came."""
    lines = []
    for line in (out / f"{stream}.jsonl").read_bytes().splitlines()[:EXAMPLES]:
        record = orjson.loads(line)
        texts = [record["text"]] if stream == "text" else [record["instruction"], record["response"]]
        flat = [" ".join(text.split()) for text in texts]
        short = [text if len(text) <= CHARACTERS else text[: CHARACTERS - 1] + "…" for text in flat]
        lines.append(f"- {record['id']}: {' **Answer:** '.join(short)}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--alone", type=int, default=8, help="samples that plain model.generate draws")
    parser.add_argument("--model", type=Path, help="where SmolLM2 lies; unpacked anew when not given")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recall_cpu.md"))
    args = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hf = args.model or folder / "model"
        if args.model is None:
            save_smollm2(hf)
        config = configuration(hf, folder / "out", args.samples)
        began = time.process_time()
        summary = recall(config)
        assert summary is not None
        seconds, tokens = time.process_time() - began, drawn_tokens(folder / "out")
        model, _ = load_directory(hf)
        one_tokens, one_seconds = alone(config, model, Asker(config), args.alone)
        args.out.write_text(page(config, summary, (tokens, seconds), (one_tokens, one_seconds), folder / "out", args))
    print(args.out)


def page(
    config: RecallConfig,
    summary: dict[str, Any],
    batched: tuple[int, float],
    one: tuple[int, float],
    out: Path,
    args: argparse.Namespace,
) -> str:
    """The table, and what the samples look like."""
    rate, one_rate = batched[0] / batched[1], one[0] / one[1]
    per_sample = (args.samples / batched[1]) / (args.alone / one[1])
    streams = summary["streams"]
    lines = [
        "# Drawing rehearsal data on CPU",
        "",
        "`python -m benchmarks.recall_cpu`: SmolLM2-135M-Instruct, fp32, one thread, batches of 32; up to "
        f"{config.sampling.max_instruction_tokens} tokens an instruction, {config.sampling.max_answer_tokens} an "
        f"answer, {config.sampling.max_text_tokens} a text.",
        "",
        "| | samples | tokens | CPU seconds | tokens a CPU second |",
        "|---|---:|---:|---:|---:|",
        f"| `mixcpt recall`, loading, filters and report included | {args.samples} | {batched[0]} | {batched[1]:.0f} | "
        f"{rate:.1f} |",
        f"| `model.generate`, one by one | {args.alone} | {one[0]} | {one[1]:.0f} | {one_rate:.1f} |",
        "",
        f"**{rate / one_rate:.1f} times** the tokens, and {per_sample:.1f} times the samples, a CPU second (aim: at "
        "least 4). Samples a second on two cores are about twice those of one: ranks share nothing.",
        "",
        "| | " + " | ".join(streams) + " |",
        "|---|" + "---:|" * len(streams),
        "| drawn | " + " | ".join(str(counts["drawn"]) for counts in streams.values()) + " |",
        "| kept | " + " | ".join(f"{c['kept']} ({c['kept'] / c['drawn']:.0%})" for c in streams.values()) + " |",
    ]
    for reason in next(iter(streams.values()))["rejected"]:
        cells = [f"{c['rejected'][reason]} ({c['rejected'][reason] / c['drawn']:.0%})" for c in streams.values()]
        lines.append(f"| {reason} | {' | '.join(cells)} |")
    lines += ["", "The first that were kept, as they came:", "", *examples(out, "instructions"), *examples(out, "text")]
    machine = f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    lines += ["", f"mixcpt {megatron_mixcpt.__version__}, {machine}, {date.today()}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
