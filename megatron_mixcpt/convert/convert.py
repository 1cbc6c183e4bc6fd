"""From a Hugging Face directory to a checkpoint, tensor by tensor."""

import dataclasses
import shutil
from pathlib import Path

from megatron_mixcpt.checkpoint import CheckpointInfo, seal
from megatron_mixcpt.convert.progress import tensor_progress
from megatron_mixcpt.convert.stream_write import write_weights
from megatron_mixcpt.huggingface.config import architecture_from_hf
from megatron_mixcpt.huggingface.metadata import claim, write_metadata
from megatron_mixcpt.huggingface.stream import one_thread, read_ahead
from megatron_mixcpt.huggingface.tokenizers import extended_vocab_size
from megatron_mixcpt.huggingface.weights import DTYPES, check_names, open_source, whole_tensor, widest
from megatron_mixcpt.model.layout import whole_shapes


def convert(
    hf_dir: Path, out: Path, dtype: str | None = None, tokenizer: Path | None = None, trust_remote_code: bool = False
) -> None:
    """Write the checkpoint; it appears under its name when it is complete.

    Raises:
        ConfigError: the model is not supported, `out` is not empty, or `tokenizer` is not the model's own plus tokens.
        VerificationError: the weights do not fit their configuration.
    """
    source_arch = architecture_from_hf(hf_dir, trust_remote_code)
    arch = source_arch
    if tokenizer is not None:
        arch = dataclasses.replace(arch, vocab_size=extended_vocab_size(hf_dir, tokenizer, arch.vocab_size))
    claim(out)
    source = open_source(hf_dir)
    check_names(source, source_arch, str(hf_dir))
    stored = DTYPES[dtype] if dtype else widest({source.dtype(name) for name in source.names()})
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was interrupted
    partial.mkdir()
    with one_thread(), tensor_progress(f"converting {hf_dir.name}", len(whole_shapes(arch))) as done:
        tensors = read_ahead(
            whole_shapes(arch),
            lambda name: whole_tensor(source, name, arch, source_arch.vocab_size, str(hf_dir)),
        )
        files = write_weights(partial, arch, stored, tensors, done)
    (partial / "hf").mkdir()
    write_metadata(partial / "hf", arch, stored, tokenizer_dir=tokenizer, source_dir=hf_dir, card=None)
    seal(partial, CheckpointInfo(0, arch, source=hf_dir.resolve().name), files)
    out.rmdir()
    partial.rename(out)
