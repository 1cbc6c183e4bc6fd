"""A model and the one that it started from, measured alike: what `mixcpt eval` does."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_mixcpt.data.mix import open_mix
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.evaluate import measure
from megatron_mixcpt.evaluate.comparison import write_comparison
from megatron_mixcpt.evaluate.loading import quiet_libraries
from megatron_mixcpt.evaluate.measure import EvalSettings, Measured
from megatron_mixcpt.files import check_writable


def evaluate(model: Path, base: Path | None, settings: EvalSettings, out: Path, *, overwrite: bool = False) -> None:
    """Write `eval.json`, `eval.html` and `eval.md` into `out`, and keep them up to date while it measures.

    Raises ConfigError for what cannot be measured, and where a whole evaluation is there already.
    """
    _check_unwritten(out, overwrite=overwrite)
    models = {"model": model} | ({} if base is None else {"base": base})
    measure.check_models(list(models.values()), settings)
    check_writable(out)
    quiet_libraries()
    measured: dict[str, Measured] = {}

    def write(*, complete: bool) -> None:
        known = {source.name for source in measured["model"]["sources"]}
        sources = open_mix(settings.mix_path).sources if settings.mix_path else []
        unmeasured = [source.name for source in sources if source.name not in known]
        against = str(base) if base else None
        write_comparison(out, measured, model=str(model), base=against, unmeasured=unmeasured, complete=complete)

    for name, path in models.items():

        def keep(parts: Measured, name: str = name) -> None:
            measured[name] = parts
            write(complete=False)

        measure.measure_model(path, settings, keep)
    write(complete=True)


def _check_unwritten(out: Path, *, overwrite: bool) -> None:
    """Raise ConfigError where a whole evaluation stands in `out` already; what was cut short may be written over."""
    path = out / "eval.json"
    if overwrite or not path.exists():
        return
    try:
        complete = json.loads(path.read_text()).get("complete", True)
    except (ValueError, AttributeError):
        complete = True  # nothing of ours, so it stays
    if complete:
        raise ConfigError(f"{path} is there already: give another --out, or --overwrite to measure again")
