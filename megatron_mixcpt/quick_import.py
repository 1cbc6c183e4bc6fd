"""megatron-core without what it takes up by itself: libraries that this program was never tested with, or never calls.

megatron-core replaces its optimizers, norms and layers by those of Transformer Engine and Apex wherever they can be
imported, as in NVIDIA's containers, and imports wandb for servers of its own. While its modules load, these are hidden;
whoever else imports them, before or after, finds them. It also decorates functions with torch.compile, which brings
Dynamo and Inductor in, half of the CPU seconds of every start: on a machine without CUDA the decorator is left out, by
megatron-core's own `disable_jit_fuser`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

CORE, JIT = "megatron.core", "megatron.core.jit"
HIDDEN = ("transformer_engine", "apex", "amp_C", "wandb")  # amp_C is Apex's


class _Finder(MetaPathFinder):
    """Finds the modules of megatron-core as Python does, and loads them with care."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != CORE and not fullname.startswith(f"{CORE}."):
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
        if module.__spec__ is not None:
            module.__loader__ = module.__spec__.loader = self._loader  # as whoever looks at the module expects
        with _hidden():
            self._loader.exec_module(module)
        if module.__name__ == JIT:
            import torch

            if not torch.cuda.is_available():
                module.disable_jit_fuser()


@contextlib.contextmanager
def _hidden() -> Iterator[None]:
    """Within it, importing what is in HIDDEN fails, which megatron-core expects."""
    if all(name in sys.modules and sys.modules[name] is None for name in HIDDEN):  # by a module that imports this one
        yield
        return
    kept = {name: module for name, module in sys.modules.items() if name.split(".", 1)[0] in HIDDEN}
    nothing: dict[str, None] = dict.fromkeys((*HIDDEN, *kept))
    sys.modules.update(nothing)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in nothing:
            del sys.modules[name]
        sys.modules.update(kept)


def quicken() -> None:
    """From here on, imports of megatron-core in this process are quick and bring nothing along. Imports nothing
    itself."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
