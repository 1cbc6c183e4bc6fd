"""The LSSD loss on a GPU beside PyTorch and other libraries in the same run: time, bandwidth, memory, error.

    python -m benchmarks.lssd_gpu                    # everything; pip install -e ".[bench-gpu]" brings the peers
    python -m benchmarks.lssd_gpu --quick            # one dtype, one temperature, no masks

Times are medians of triton.testing.do_bench, which flushes the L2 cache between runs, on random logits. Bandwidth
counts the bytes that have to move (10 a bf16 logit), so its share of a copy measured in the same run is comparable
between contenders. Errors are the largest of 64 tokens against fp64, the gradient's relative to its largest value.
Writes lssd_gpu.md, lssd_gpu.json and lssd_gpu.png. One GPU: nothing here measures communication between several.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.lssd_memory import PeakMemory
from benchmarks.lssd_peers import LOGITS, Contender, Loss, linear_contenders
from benchmarks.lssd_report import Case, Record, aims, plot, table
from megatron_mixcpt.files import write_whole

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CHECKED = 64  # tokens whose error against fp64 is taken


def milliseconds(run: Callable[[], object], device: str) -> float:
    """Median time; on the CPU, which only serves to try this program out, of a few calls."""
    if device == "cuda":
        from triton.testing import do_bench

        return do_bench(run, warmup=25, rep=100, quantiles=[0.5])
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[1]


def peak_mebibytes(run: Callable[[], object], device: str) -> float:
    """Most memory that was allocated during the run beyond what was before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with PeakMemory() as memory:
        run()
    return memory.peak / 2**20


def copy_bandwidth(device: str, mebibytes: int) -> float:
    """GB/s of a copy, read and write counted."""
    source = torch.empty(mebibytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), device) / 1e6


def tokens(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    student, teacher = (
        torch.randn(case.tokens, case.vocab, generator=generator, device=device, dtype=DTYPES[case.dtype])
        for _ in range(2)
    )
    labels = torch.randint(0, case.vocab, (case.tokens,), generator=generator, device=device)
    ignored = torch.rand(case.tokens, generator=generator, device=device) * 100 < case.masked
    upstream = torch.rand(case.tokens, generator=generator, device=device)
    return student.requires_grad_(), teacher, labels.masked_fill(ignored, -100), upstream


def gradient_of(loss: Tensor, student: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student, upstream.to(loss.dtype) if loss.dim() else None)[0]


def errors(loss: Loss, case: Case, device: str) -> tuple[float, float]:
    """(largest error of the loss, largest of the gradient as a share of the largest gradient) of a few tokens."""
    small = dataclasses.replace(case, tokens=min(CHECKED, case.tokens), masked=0)
    student, teacher, labels, upstream = tokens(small, device)
    value = loss(student, teacher, labels)
    gradient = gradient_of(value, student, upstream)
    exact = student.detach().double().requires_grad_()
    expected = exact_loss(exact, teacher, labels, case.temperature)
    (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.double())
    gradient_error = (gradient.double() - expected_gradient).abs().max() / expected_gradient.abs().max()
    return (value.double() - expected).abs().max().item(), gradient_error.item()


def exact_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The loss in fp64, written apart from eager_lssd_loss, which computes in fp32 whatever it is given."""
    argmax, label = teacher.argmax(-1, keepdim=True), labels.unsqueeze(-1)
    log_p = torch.log_softmax(teacher.double() / temperature, -1)
    log_p = log_p.scatter(-1, argmax, log_p.gather(-1, label)).scatter(-1, label, log_p.gather(-1, argmax))
    kl = (log_p.exp() * (log_p - torch.log_softmax(student / temperature, -1))).sum(-1)
    return kl - torch.log_softmax(student, -1).gather(-1, label).squeeze(-1)


def measure(contender: Contender, case: Case, device: str) -> Record:
    """One line of the table; what cannot run says why in its note."""
    record = Record(case, contender.name, contender.work, None, None)
    if (case.masked and not contender.masks) or (case.temperature != 1 and not contender.any_temperature):
        return dataclasses.replace(record, note="does not take these options")
    student, teacher, labels, upstream = tokens(case, device)
    try:
        loss = contender.make(case.temperature)

        def both() -> Tensor:
            return gradient_of(loss(student, teacher, labels), student, upstream)

        both()  # compiles
        record = dataclasses.replace(
            record,
            memory=peak_mebibytes(both, device),
            forward=milliseconds(lambda: loss(student, teacher, labels), device),
            both=milliseconds(both, device),
        )
        if contender.work == "swap + KL + CE":
            loss_error, gradient_error = errors(loss, case, device)
            record = dataclasses.replace(record, loss_error=loss_error, gradient_error=gradient_error)
    except ImportError:
        return dataclasses.replace(record, note="not installed")
    except torch.OutOfMemoryError:
        return dataclasses.replace(record, note="out of memory")
    except Exception as error:  # a peer's failure is a result, not the end of the run; ours must not fail
        if contender.name.startswith("ours"):
            raise
        return dataclasses.replace(record, note=f"failed: {type(error).__name__}")
    return record


def linear_table(sizes: list[int], device: str) -> str:
    """The losses from hidden states, beside the time of the six products that backward with recomputation needs."""
    num_tokens, hidden, vocab = sizes
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.bfloat16)

    x, w, tx, tw = random(num_tokens, hidden), random(vocab, hidden), random(num_tokens, hidden), random(vocab, hidden)
    labels = torch.randint(0, vocab, (num_tokens,), generator=generator, device=device)
    step = min(1024, num_tokens)
    logits = random(step, vocab)
    products = [lambda: x[:step] @ w.t()] * 4 + [lambda: logits @ w, lambda: logits.t() @ x[:step]]
    floor = sum(milliseconds(product, device) for product in products) * num_tokens / step
    lines = [
        f"From hidden states: {num_tokens} tokens, {hidden} wide, vocabulary {vocab}, bf16. Six products of 16-bit "
        f"matrices in chunks of {step}: {floor:.3g} ms.",
        "",
        "| contender | both ms | / products | MiB beyond inputs |",
        "|---|---|---|---|",
    ]
    inputs = x.requires_grad_(), w.requires_grad_()
    for name, loss in linear_contenders().items():

        def both(loss=loss) -> object:
            value = loss(*inputs, tx, tw, labels)
            return torch.autograd.grad(value, inputs, torch.ones_like(value))

        try:
            both()
            memory, ms = peak_mebibytes(both, device), milliseconds(both, device)
            lines.append(f"| {name} | {ms:.3g} | {ms / floor:.3g} | {memory:.4g} |")
        except Exception as error:
            if name == "ours":
                raise
            lines.append(f"| {name} | failed: {type(error).__name__} | | |")
    return "\n".join(lines)


def write_report(folder: Path, records: list[Record], copied: float, device: str, linear: str = "") -> str:
    """lssd_gpu.md, which is returned, and lssd_gpu.json. copied: GB/s of a copy, of this run."""
    sections = [
        "# The LSSD loss on a GPU",
        f"{machine(device)}. Copy: {copied:.0f} GB/s. Several GPUs were not measured.",
        aims(records, copied),
        linear,
        "![time and bandwidth](lssd_gpu.png)",
        table(records, copied),
    ]
    report = "\n\n".join(section for section in sections if section)
    write_whole(folder / "lssd_gpu.md", report + "\n")
    write_whole(folder / "lssd_gpu.json", json.dumps([dataclasses.asdict(r) for r in records], indent=1) + "\n")
    return report


def machine(device: str) -> str:
    import triton

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU: a trial of this program, not a measurement"
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    return f"{name}; {versions}, CUDA {torch.version.cuda}"


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for dtype, temperature, masked, vocab, count in itertools.product(
        options.dtype, options.tau, options.mask, options.vocab, options.tokens
    ):
        yield Case(count, vocab, dtype, temperature, masked)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lssd_gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--vocab", type=int, nargs="+", default=[16032, 18992, 32064, 128256, 151936])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--tau", type=float, nargs="+", default=[1.0, 2.0], help="temperatures")
    parser.add_argument("--mask", type=int, nargs="+", default=[0, 50], help="percent of tokens without loss")
    parser.add_argument("--only", nargs="+", choices=[c.name for c in LOGITS], help="contenders (default: all)")
    parser.add_argument(
        "--linear", type=int, nargs=3, default=[8192, 4096, 128256], metavar=("TOKENS", "HIDDEN", "VOCAB")
    )
    parser.add_argument("--quick", action="store_true", help="bf16, temperature 1, no masks")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries this program out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if options.quick:
        options.dtype, options.tau, options.mask = ["bf16"], [1.0], [0]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA device: this benchmark measures GPUs (--device cpu only tries it out)", file=sys.stderr)
        return 2
    contenders = [c for c in LOGITS if not options.only or c.name in options.only]
    copied = copy_bandwidth(options.device, 1024 if options.device == "cuda" else 16)
    options.out.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    for case in cases(options):
        print(case.label, flush=True)
        records += [measure(contender, case, options.device) for contender in contenders]
        if options.device == "cuda":
            torch.cuda.empty_cache()
        write_report(options.out, records, copied, options.device)  # what is there is there, whatever comes
    linear = linear_table(options.linear, options.device)
    print(write_report(options.out, records, copied, options.device, linear))
    plot(records, copied, options.out / "lssd_gpu.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
