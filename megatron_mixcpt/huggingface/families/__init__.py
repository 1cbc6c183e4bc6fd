"""The families of models that come from Hugging Face and go back there: a file a family, found by lying here."""

import importlib
import pkgutil

from megatron_mixcpt.huggingface.families.family import Family


def _found() -> dict[str, Family]:
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    families = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.model_type: family for family in families}


FAMILIES: dict[str, Family] = _found()
"""By `model_type` of config.json."""
