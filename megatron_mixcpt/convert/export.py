"""From a run or checkpoint to a Hugging Face directory, tensor by tensor; an adapter alone where asked."""

import shutil
from pathlib import Path
from typing import Any

from megatron_mixcpt import __version__, hf_alora
from megatron_mixcpt.adapters.files import FOLDER, write_directory
from megatron_mixcpt.adapters.layout import adapted_linears
from megatron_mixcpt.adapters.state import read_adapters
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.architecture.layout import whole_shapes
from megatron_mixcpt.checkpoint.manifest import fingerprint
from megatron_mixcpt.checkpoint.origin import Origin, find_origin, hf_base, run_config
from megatron_mixcpt.checkpoint.store import result_of
from megatron_mixcpt.checkpoint.verify import warn
from megatron_mixcpt.config import AdapterConfig
from megatron_mixcpt.convert.card import model_card
from megatron_mixcpt.convert.weights import WholeTensors, open_base, open_weights
from megatron_mixcpt.data_prep.chat import end_of_turn
from megatron_mixcpt.data_prep.format import TEXT_KINDS
from megatron_mixcpt.data_prep.tokenizer import load_tokenizer
from megatron_mixcpt.errors import ConfigError, MixcptError, VerificationError
from megatron_mixcpt.files import is_made, new_directory, record_made
from megatron_mixcpt.huggingface.metadata import copy_tokenizer, stop_at, write_metadata
from megatron_mixcpt.huggingface.names import hf_names, hf_shapes, split
from megatron_mixcpt.huggingface.stream import one_thread, read_ahead
from megatron_mixcpt.huggingface.tensorfiles import SafetensorsWriter
from megatron_mixcpt.huggingface.weights import DTYPES
from megatron_mixcpt.progress import Progress


def export(source: Path, out: Path, dtype: str | None = None, *, allow_older: bool = False) -> bool:
    """Write the directory, tensor by tensor; it appears under its name when it is complete.

    Returns whether it had to: False where `out` holds just that already.

    Args:
        allow_older: see `find_checkpoint`.

    Raises:
        VerificationError: there is no complete checkpoint, it is damaged, or its data has another tokenizer now.
        ConfigError: `out` is not empty, what the run started from is gone, or its adapter cannot be merged.
    """
    origin = find_origin(source, allow_older=allow_older)
    _check_tokenizer(origin)
    _warn_of_no_result(source, origin)
    made = _made(origin, dtype=dtype)
    if is_made(out, made):
        return False
    weights = open_weights(origin)
    with new_directory(out) as partial:
        _write_model(partial, origin, weights, dtype, f"exporting {source.name}")
        record_made(partial, made)
    return True


def _made(origin: Origin, **options: Any) -> dict[str, Any]:
    of = {"command": "export", "version": __version__, "checkpoint": fingerprint(origin.checkpoint)}
    return of | {"tokenizer": origin.mix.tokenizer_hash if origin.mix else None} | options


def export_adapter(source: Path, out: Path, *, allow_older: bool = False) -> str:
    """Write the adapter's directory; it appears under its name when it is complete. Returns what was done, and how it
    is loaded.

    The base model is named where it is a Hugging Face directory, and else written into `base/` beside the adapter.

    Raises as `export`, and ConfigError where the run trained no adapter.
    """
    origin = find_origin(source, allow_older=allow_older)
    if origin.adapter is None:
        raise ConfigError(f"{source} trained all weights, no adapter: leave --adapter out")
    _check_tokenizer(origin)
    hf = hf_base(origin.config, origin.arch, origin.adapter)
    base = str(hf) if hf else "base"
    how = f"peft loads it over {hf or out / base}"
    if origin.adapter.method == "alora":
        how = "megatron_mixcpt.hf_alora.load_alora loads it"
    made = _made(origin, adapter=True, base=base)
    if is_made(out, made):
        return f"is there already; {how}"
    with new_directory(out) as partial:
        if not hf:
            (partial / base).mkdir()
            _write_model(partial / base, origin, open_base(origin), None, f"exporting the base of {source.name}")
        tensors = read_adapters(origin.checkpoint, adapted_linears(origin.arch, origin.adapter))
        write_directory(partial, origin.arch, origin.adapter, tensors, base)
        for folder in (origin.source_dir, origin.tokenizer_dir):  # the second over the first, as beside a whole model
            if folder:
                copy_tokenizer(folder, partial)
        (partial / "README.md").write_text(model_card(origin))
        if origin.adapter.method == "alora":
            shutil.copyfile(hf_alora.__file__, partial / "hf_alora.py")
        record_made(partial, made)
    return f"exported; {how}"


def _check_tokenizer(origin: Origin) -> None:
    """Raise VerificationError where the data of a run was prepared again with another tokenizer than it was trained
    with. Where the data is gone, warn that the tokenizer is the one that the run started from."""
    training, config = origin.info.training, origin.config
    if training is None or config is None:
        return
    if origin.mix is None:
        if origin.source_dir is None or _tokenizer_hash(origin.source_dir) != training.tokenizer_hash:
            warn(
                f"warning: {config.data.mix} is gone, and with it the tokenizer that {origin.checkpoint} was trained "
                f"with: that of {origin.source_dir or 'no model'} is written, without what the data's own had more"
            )
    elif origin.mix.tokenizer_hash != training.tokenizer_hash:
        raise VerificationError(
            f"{origin.checkpoint} was trained with another tokenizer than {origin.mix.path} has now: prepare that data "
            f"with the tokenizer it had, or set data.mix in {origin.run_dir}/config.yaml to data that has it"
        )


def _warn_of_no_result(source: Path, origin: Origin) -> None:
    """A run with a forgetting budget names its result at its end; before, its newest checkpoint may be beyond it."""
    budget = origin.config.forget if origin.config else None
    if budget and origin.run_dir and source != origin.checkpoint and result_of(origin.run_dir / "checkpoints") is None:
        warn(
            f"warning: {source} has not come to its end, so no checkpoint was chosen that keeps its forgetting budget "
            f"of {budget.budget:g}: {origin.checkpoint.name} is the newest"
        )


def _tokenizer_hash(folder: Path) -> str | None:
    try:
        return load_tokenizer(folder).hash
    except MixcptError:
        return None


def _write_model(folder: Path, origin: Origin, weights: WholeTensors, dtype: str | None, title: str) -> None:

    written, arch = DTYPES[dtype] if dtype else weights.dtype, origin.arch
    shapes = whole_shapes(arch)
    with (
        one_thread(),
        Progress(title, len(shapes), "tensors") as progress,
        SafetensorsWriter(folder, hf_shapes(arch), written) as writer,
    ):
        for name, whole in read_ahead(shapes, weights.read):
            for part, tensor in zip(hf_names(name, arch), split(name, whole, arch)):
                writer.write(part, tensor)
            progress.advance()
    write_metadata(folder, arch, written, origin.tokenizer_dir, origin.source_dir, model_card(origin))
    _stop_after_answers(folder, origin)


def _stop_after_answers(folder: Path, origin: Origin) -> None:
    """A base model's settings stop at the end of a document, and who learned conversations ends a turn instead."""
    if origin.mix is None or all(source.kind in TEXT_KINDS for source in origin.mix.train_sources):
        return
    try:
        tokenizer = load_tokenizer(folder)
    except MixcptError:  # neither the data nor the start has one that is known
        return
    token = end_of_turn(tokenizer)
    if token is not None and stop_at(folder, token):
        spelling = next(text for text, number in tokenizer.control.items() if number == token)
        warn(
            f"generation_config.json: eos_token_id has {token} ({spelling}) too: the chat template ends answers with it"
        )


def write_adapter_of(checkpoint: Path, arch: Architecture, config: AdapterConfig) -> None:
    """Lay the adapter of a checkpoint, whose shares are all written, beside them as `adapter/`."""
    try:
        base = hf_base(run_config(checkpoint), arch, config)
    except MixcptError:  # not written by `mixcpt train`, or what the run started from is gone
        base = None
    out = checkpoint / FOLDER
    out.mkdir()
    tensors = read_adapters(checkpoint, adapted_linears(arch, config))
    write_directory(out, arch, config, tensors, str(base) if base else None)
