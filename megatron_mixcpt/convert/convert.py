"""From a Hugging Face directory to a checkpoint, tensor by tensor."""

import dataclasses
from pathlib import Path

from megatron_mixcpt.architecture.layout import whole_shapes
from megatron_mixcpt.checkpoint import CheckpointInfo, seal
from megatron_mixcpt.convert.stream_write import write_weights
from megatron_mixcpt.files import new_directory
from megatron_mixcpt.huggingface.config import architecture_from_hf
from megatron_mixcpt.huggingface.metadata import write_metadata
from megatron_mixcpt.huggingface.names import hf_shapes
from megatron_mixcpt.huggingface.stream import one_thread, read_ahead
from megatron_mixcpt.huggingface.tokenizers import extended_vocab_size
from megatron_mixcpt.huggingface.weights import DTYPES, check_names, open_source, whole_tensor, widest
from megatron_mixcpt.progress import Progress


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
    source = open_source(hf_dir)
    check_names(source, source_arch, str(hf_dir))
    stored = DTYPES[dtype] if dtype else widest({source.dtype(name) for name in hf_shapes(source_arch)})
    with new_directory(out) as partial:
        with one_thread(), Progress(f"converting {hf_dir.name}", len(whole_shapes(arch)), "tensors") as progress:
            tensors = read_ahead(
                whole_shapes(arch),
                lambda name: whole_tensor(source, name, arch, source_arch.vocab_size, str(hf_dir)),
            )
            files = write_weights(partial, arch, stored, tensors, lambda key: progress.advance())
        (partial / "hf").mkdir()
        write_metadata(partial / "hf", arch, stored, tokenizer_dir=tokenizer, source_dir=hf_dir, card=None)
        seal(partial, CheckpointInfo(0, arch, source=hf_dir.resolve().name), files)
