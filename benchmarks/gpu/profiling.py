"""One Mix-CPT step under torch's profiler: what the device spends its time with, and what waits for it.

profile.md has the kernels and the waits of each model, trace.json.gz the first one's step for https://ui.perfetto.dev.
"""

from __future__ import annotations

import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import workload
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.summary import table
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.files import write_whole

SHOWN = 30  # kernels, and places that wait
LARGEST_TRACE = 12 * 2**20
# Of the host for the device.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")
COPIES = "Memcpy DtoH"


def run(findings: Findings, *, small: bool) -> None:
    models = workload.SMALL_MODELS if small else dict(reversed(workload.MODELS.items()))
    tokens, document = (
        (workload.SMALL_TOKENS[0], workload.SMALL_PACKED) if small else (workload.TOKENS[0], workload.PACKED)
    )
    findings.plan(*models)
    texts = ["# One Mix-CPT step"]
    for model, arch in models.items():
        with findings.tried(model) as values:
            first = model == next(iter(models))
            text, busy, waits = _profiled(arch, tokens, document, findings.folder / "trace.json.gz" if first else None)
            texts.append(f"## {model}, {tokens} tokens in documents of {document}\n\n{text}")
            write_whole(findings.folder / "profile.md", "\n\n".join(texts) + "\n")
            values |= {"device busy": busy, "waits of the host": waits}


def _profiled(arch: Architecture, tokens: int, document: int, trace: Path | None) -> tuple[str, float | None, int]:
    """(tables of kernels and waits, the share of the step in which the device was busy, how often the host waited)."""
    with tempfile.TemporaryDirectory() as name:
        weights = workload.write_random(arch, Path(name) / "model")
        with workload.trainer(arch, weights, Path(name), "none", {}) as (forward_backward, optimize):
            batch = workload.batch(arch, tokens, document)

            def step() -> None:
                forward_backward(batch)
                optimize()
                workload.wait()

            for _ in range(workload.WARM):
                step()
            with profile(activities=_activities()) as traced:
                step()
            if trace is not None:
                _keep(traced, trace)
            places = _places(step)
    text, busy = _told(traced)
    return f"{text}\n\n{_waiting(places)}", busy, sum(count for _, count in places)


def _activities() -> list[ProfilerActivity]:
    cuda = [ProfilerActivity.CUDA] if workload.device().type == "cuda" else []
    return [ProfilerActivity.CPU, *cuda]


def _told(traced: profile) -> tuple[str, float | None]:
    """(what took how long, the share of the step in which the device was busy)."""
    on_device = workload.device().type == "cuda"
    events = [event for event in traced.events() or [] if event.device_type == _kind(on_device)]
    taken: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in traced.key_averages():
        if event.device_type == _kind(on_device):
            taken[event.key] += event.self_device_time_total if on_device else event.self_cpu_time_total
            counts[event.key] += event.count
    whole = sum(taken.values()) or 1.0
    rows = [[name[:100], counts[name], us / 1000, f"{us / whole:.1%}"] for name, us in taken.most_common(SHOWN)]
    lines = [table(["kernel" if on_device else "operator", "times", "ms", "of all"], rows)]
    waits = [event for event in traced.key_averages() if event.key in WAITS or event.key.startswith(COPIES)]
    rows = [[event.key, event.count, event.cpu_time_total / 1000] for event in waits]
    lines += ["", table(["wait", "times", "ms of the host"], rows)] if rows else ["", "No waits."]
    if not on_device or not events:
        return "\n".join(lines), None
    begin, end = _span(list(traced.events() or []))
    busy = _covered([(event.time_range.start, event.time_range.end) for event in events]) / (end - begin)
    return "\n".join([f"The device was busy for {busy:.1%} of {(end - begin) / 1000:.2f} ms.", "", *lines]), busy


def _kind(on_device: bool) -> DeviceType:
    return DeviceType.CUDA if on_device else DeviceType.CPU


def _span(events: list[Any]) -> tuple[float, float]:
    return min(e.time_range.start for e in events), max(e.time_range.end for e in events)


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _places(step: Callable[[], None]) -> list[tuple[str, int]]:
    """Where Python was when the host had to wait for the device in a step, and how often; the step's own end apart."""
    if workload.device().type != "cuda":
        return []
    places: Counter[str] = Counter()

    def seen(*args: Any, **options: Any) -> None:
        frames = [f for f in traceback.extract_stack()[:-1] if "/warnings.py" not in f.filename]
        places[" < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames[-4:]))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = seen
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [place for place in places.most_common() if "workload.py" not in place[0].split(" < ")[0]]


def _waiting(places: list[tuple[str, int]]) -> str:
    if not places:
        return "Nothing in Python waited for the device."
    return table(["waited for the device in", "times"], [list(place) for place in places[:SHOWN]])


def _keep(traced: profile, path: Path) -> None:
    traced.export_chrome_trace(str(path))
    if path.stat().st_size > LARGEST_TRACE:
        path.unlink()
        print(f"{path.name}: too large to keep", flush=True)
