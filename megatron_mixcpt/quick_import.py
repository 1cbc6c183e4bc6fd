"""Libraries without what they do and this program never needs: half of the CPU seconds of every start.

megatron-core decorates functions with torch.compile, which brings Dynamo and Inductor in, and imports wandb for servers
of its own. On a machine without CUDA the decorator is left out (by megatron-core's own `disable_jit_fuser`); wandb is
hidden from it everywhere, and found again by whoever imports it afterwards.

transformers parses a GGUF file, tens of thousands of tokenizer entries one by one, for configuration, weights and
tokenizer anew, and makes one table for every tensor: here the file is parsed and the table made once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

CORE, JIT, HIDDEN, GGUF = "megatron.core", "megatron.core.jit", "wandb", "gguf"
GGUF_REPEATED = ("GGUFReader", "get_tensor_name_map")


class _Finder(MetaPathFinder):
    """Finds these modules as Python does, and loads them with care."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (CORE, JIT, GGUF):
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Careful(spec.loader)
        return spec


class _Careful(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == GGUF:
            self._loader.exec_module(module)
            for name in GGUF_REPEATED:
                setattr(module, name, lru_cache(maxsize=1)(getattr(module, name)))
        elif module.__name__ == JIT:
            self._loader.exec_module(module)
            import torch

            if not torch.cuda.is_available():
                module.disable_jit_fuser()
        elif HIDDEN in sys.modules:
            self._loader.exec_module(module)
        else:
            sys.modules[HIDDEN] = None  # type: ignore[assignment]  # importing it fails, which megatron-core expects
            try:
                self._loader.exec_module(module)
            finally:
                del sys.modules[HIDDEN]


def quicken() -> None:
    """From here on, megatron-core and GGUF files are quick in this process. Imports nothing itself."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
