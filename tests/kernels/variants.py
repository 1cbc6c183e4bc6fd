"""Variants of the kernels that between them use every path of the compiler's."""

from megatron_mixcpt.kernels import aot

SWAP = dict(HAS_TEACHER=True, SEPARATE=False)
NARROW = aot.make_variant("stats", SWAP, "bf16", "bf16", aligned=False)
VARIANTS = [
    aot.make_variant("stats", SWAP, "bf16", "bf16"),
    aot.make_variant("stats", SWAP | {"SEPARATE": True}, "fp32", "bf16"),
    NARROW,
    aot.make_variant("combine", dict(TARGET="mft", HAS_TEACHER=True, SEPARATE=True, PER_TOKEN=True, DETAILS=True)),
    aot.make_variant("combine", dict(TARGET="swap", **SWAP, PER_TOKEN=False, DETAILS=False), ones=True),
    aot.make_variant("gradient", SWAP | {"PER_TOKEN": True}, "bf16", "bf16"),
    aot.make_variant("gradient", SWAP | {"PER_TOKEN": True}, "bf16", "bf16", ones=True),
    aot.make_variant("gradient", dict(HAS_TEACHER=False, SEPARATE=True, PER_TOKEN=False)),
]
