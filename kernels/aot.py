"""Compile every kernel and variant ahead of time, without a GPU, and report what the compiler made of it.

    python -m megatron_mixcpt.kernels.aot --arch 80 90 100 > benchmarks/results/lssd_aot.md

Exits with 1 if a kernel spills registers, or reads or writes logits in pieces of less than 16 bytes although the rows
are aligned; with 2 if the kernels cannot be compiled here (wrong arguments, no triton, its interpreter is on).
"""

import argparse
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_mixcpt.kernels.constants import TARGETS

KERNELS = ("stats", "combine", "gradient")
FLAGS = (False, True)
LEGEND = (
    "Loads and stores are counted in the code of one thread; what aligned variants load in narrower pieces are single "
    "words of the record, never logits. No GPU was used. Made by `python -m megatron_mixcpt.kernels.aot`."
)
POINTERS = {"labels": "*i64", "swapped_out": "*i1"}
FLOATS = ("scale", "inverse_tau", "margin")
STRIDES = ("s_outer", "s_inner", "t_outer", "t_inner", "out_outer", "out_inner")
UNALIGNED_IF_ODD = (*STRIDES, "valid", "width")
ONES = (
    "num_inner", "s_outer", "s_inner", "t_outer", "t_inner", "out_outer", "out_inner", "word_stride", "record_stride",
    "num_tokens", "num_shards", "vocab_start", "valid", "width",
)  # fmt: skip
ALIGNED = (*UNALIGNED_IF_ODD, "student", "teacher", "out", "split_columns")


@dataclass(frozen=True)
class Variant:
    """One specialisation of one kernel.

    aligned: rows start at multiples of 16 bytes. ones: every size and stride is 1, which Triton compiles in.
    """

    kernel: str
    constants: tuple[tuple[str, object], ...]
    student: str = "fp32"
    teacher: str = "fp32"
    aligned: bool = True
    ones: bool = False

    @property
    def options(self) -> dict:
        return dict(self.constants)

    @property
    def label(self) -> str:
        flags = [str(value).lower() if value is not True else name.lower() for name, value in self.constants if value]
        logits = "" if self.kernel == "combine" else self.student + (f"/{self.teacher}" if self._mixed else "")
        return " ".join(
            filter(None, [logits, *flags, "" if self.aligned else "unaligned", "ones" if self.ones else ""])
        )

    @property
    def _mixed(self) -> bool:
        return self.student != self.teacher and bool(self.options["HAS_TEACHER"])

    @property
    def scalar_loads(self) -> int:
        """Reads of single values that the source asks for; every other read is of a tile of logits."""
        teacher, separate = self.options["HAS_TEACHER"], self.options["SEPARATE"]
        if self.kernel == "stats":
            return 4 if teacher else 2  # label, S_Y, T_Y, S_A
        return 4 + separate + 6 * teacher + 2 * self.options["PER_TOKEN"]  # label, upstream, the record, weights


@dataclass(frozen=True)
class Report:
    """What one variant became on one architecture; sizes in bytes, loads and stores per thread in the whole code."""

    variant: Variant
    arch: int
    registers: int
    spilled: int
    shared: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    ptx: int

    @property
    def problems(self) -> list[str]:
        found = [f"spills {self.spilled} bytes"] if self.spilled else []
        if self.variant.kernel == "combine" or self.variant.ones or not self.variant.aligned:
            return found
        if self.narrow_loads > self.variant.scalar_loads or not self.wide_loads:
            found.append(f"{self.narrow_loads - self.variant.scalar_loads} loads of logits are under 16 bytes")
        if self.variant.kernel == "gradient" and (self.narrow_stores or not self.wide_stores):
            found.append(f"{self.narrow_stores} stores of gradients are under 16 bytes")
        return found


def variants(kernels: tuple[str, ...] = KERNELS) -> Iterator[Variant]:
    """Every specialisation that the launches in fused.py can ask for, with the usual alignment."""
    for kernel in kernels:
        yield from _combine_variants() if kernel == "combine" else _logits_variants(kernel)


def _logits_variants(kernel: str) -> Iterator[Variant]:
    logits = [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16")]
    weights: list[dict] = [{"PER_TOKEN": flag} for flag in FLAGS] if kernel == "gradient" else [{}]
    for has_teacher, separate, weight in itertools.product(FLAGS, FLAGS, weights):
        constants = dict(HAS_TEACHER=has_teacher, SEPARATE=separate, **weight)
        for (student, teacher), aligned in itertools.product(logits, FLAGS):
            if has_teacher or student == teacher:
                yield make_variant(kernel, constants, student, teacher, aligned)
        yield make_variant(kernel, constants, "bf16", "bf16", ones=True)


def _combine_variants() -> Iterator[Variant]:
    targets = [(target, True) for target in TARGETS] + [("swap", False)]  # without a teacher it has no part
    for (target, has_teacher), separate, per_token in itertools.product(targets, FLAGS, FLAGS):
        constants = dict(TARGET=target, HAS_TEACHER=has_teacher, SEPARATE=separate, PER_TOKEN=per_token)
        yield make_variant("combine", constants | {"DETAILS": False}, ones=True)
        for details in FLAGS:
            yield make_variant("combine", constants | {"DETAILS": details})


def make_variant(
    kernel: str,
    constants: dict,
    student: str = "fp32",
    teacher: str = "fp32",
    aligned: bool = True,
    ones: bool = False,
) -> Variant:
    """The variant of `kernel` with these compile-time constants; types in Triton's spelling."""
    return Variant(kernel, tuple(constants.items()), student, teacher, aligned, ones)


def compile_variant(variant: Variant, arch: int) -> Report:
    """Compile for compute capability `arch` / 10 with the launch parameters of fused.py."""
    import triton
    from triton.backends.compiler import GPUTarget

    from megatron_mixcpt.kernels import fused

    function = getattr(fused, f"{variant.kernel}_kernel")
    constants = variant.options | {"BLOCK": fused.COMBINE_BLOCK if variant.kernel == "combine" else fused.BLOCK}
    if variant.kernel == "stats":
        constants["STAGES"] = fused.NUM_STAGES if variant.aligned else 1
    if variant.ones:
        constants |= {name: 1 for name in ONES if name in function.arg_names}
    signature = {name: _type(name, variant, constants) for name in function.arg_names}
    aligned = [
        index
        for index, name in enumerate(function.arg_names)
        if name in ALIGNED and name not in constants and (variant.aligned or name not in UNALIGNED_IF_ODD)
    ]
    options = {} if variant.kernel == "combine" else {"num_warps": fused.NUM_WARPS}
    source = _source(function, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    registers, spilled = _resources(compiled.asm["cubin"], Path(triton.__file__).parent)
    wide_loads, narrow_loads = _count(ptx, r"ld\.global(?:\.[a-z]\w*::\S+)?(?:\.(v\d))?\.[bf](\d+)")
    async_copies = [int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global.*?\], (0x\w+|\d+)", ptx)]
    wide_stores, narrow_stores = _count(ptx, r"st\.global(?:\.(v\d))?\.[bf](\d+)")
    return Report(
        variant,
        arch,
        registers,
        spilled,
        compiled.metadata.shared,
        wide_loads + sum(size >= 16 for size in async_copies),
        narrow_loads + sum(size < 16 for size in async_copies),
        wide_stores,
        narrow_stores,
        len(ptx),
    )


def _source(function, signature: dict, constants: dict, aligned: list[int]):
    """What Triton compiles; `aligned` are the positions of the arguments that are multiples of 16."""
    from triton.backends import compiler
    from triton.compiler import ASTSource

    if hasattr(compiler, "AttrsDescriptor"):  # until triton 3.2
        types = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        return ASTSource(function, types, constants, compiler.AttrsDescriptor.from_hints({i: 16 for i in aligned}))
    return ASTSource(function, signature, constants, {(index,): [["tt.divisibility", 16]] for index in aligned})


def _type(name: str, variant: Variant, constants: dict) -> str:
    if name in constants:
        return "constexpr"
    if name in ("student", "out"):
        return f"*{variant.student}"
    if name == "teacher":
        return f"*{variant.teacher}"
    if name in ("ce_weight", "kd_weight"):
        return "*fp32" if variant.options["PER_TOKEN"] else "fp32"
    if name in FLOATS:
        return "fp32"
    if name in STRIDES:
        return "i64" if name.endswith("outer") else "i32"
    if name in ("words", "shards", "record", "upstream", "loss") or name.endswith("_out"):
        return POINTERS.get(name, "*fp32")
    return POINTERS.get(name, "i32")


def _count(ptx: str, pattern: str) -> tuple[int, int]:
    """(accesses of 16 bytes, narrower ones)."""
    sizes = [int(vector[1:] or 1) * int(bits) // 8 if vector else int(bits) // 8
             for vector, bits in re.findall(pattern, ptx)]  # fmt: skip
    return sum(size >= 16 for size in sizes), sum(size < 16 for size in sizes)


def _resources(cubin: bytes, triton_folder: Path) -> tuple[int, int]:
    """(registers a thread, bytes of registers spilled to memory)."""
    tool = triton_folder / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    values = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    return values["REG"], values["STACK"] + values["LOCAL"]


def table(reports: list[Report]) -> str:
    """Markdown, one line a variant; where the architectures differ, one figure for each, in their order."""
    lines = [
        "| kernel | variant | registers | spilled B | shared B | 16 B loads | narrower | 16 B stores | PTX kB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(report.variant for report in reports):
        mine = [report for report in reports if report.variant == variant]
        names = ("registers", "spilled", "shared", "wide_loads", "narrow_loads", "wide_stores")
        columns = [[getattr(report, name) for report in mine] for name in names]
        columns.append([round(report.ptx / 1000) for report in mine])
        cells = [column[:1] if len(set(column)) == 1 else column for column in columns]
        figures = ["/".join(map(str, cell)) for cell in cells]
        lines.append("| " + " | ".join([variant.kernel, variant.label, *figures]) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_mixcpt.kernels.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities times ten")
    parser.add_argument("--kernel", choices=KERNELS, nargs="+", default=list(KERNELS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("error: TRITON_INTERPRET=1 replaces the compiler by an interpreter: unset it", file=sys.stderr)
        return 2
    try:
        import triton
    except ImportError:
        print("error: triton is not installed (pip install triton)", file=sys.stderr)
        return 2
    work = [(variant, arch) for arch in options.arch for variant in variants(tuple(options.kernel))]
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        reports = list(pool.map(compile_variant, *zip(*work), chunksize=8))
    failures = [(report, problem) for report in reports for problem in report.problems]
    for report, problem in failures:
        print(f"error: {report.variant.kernel} {report.variant.label} sm_{report.arch}: {problem}", file=sys.stderr)
    architectures = ", ".join(f"sm_{arch}" for arch in options.arch)
    print("# The LSSD kernels as compiled ahead of time\n")
    print(
        f"triton {triton.__version__}, {architectures}: {len(reports)} compiled, {len(failures)} problems. {LEGEND}\n"
    )
    print(table(reports))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
