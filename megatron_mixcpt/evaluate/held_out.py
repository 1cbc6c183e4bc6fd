"""Perplexity of every source's held-out split, by the trainer's own model and its own validation."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.data.mix import Mix
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.evaluate.target import is_hf_directory
from megatron_mixcpt.huggingface.config import architecture_from_hf
from megatron_mixcpt.progress import Progress


@dataclass(frozen=True)
class SourcePerplexity:
    """exp of the mean negative log-likelihood (nats) of a source's target tokens."""

    name: str
    kind: str
    value: float


def check_vocabulary(path: Path, arch: Architecture, mix: Mix) -> None:
    """Raise ConfigError where the model at `path` has fewer embedding rows than the mixture's tokenizer needs."""
    if mix.vocab_size > arch.vocab_size:
        raise ConfigError(
            f"{path} has {arch.vocab_size} embedding rows, the tokenizer of {mix.path} {mix.vocab_size} entries: "
            "they do not belong together"
        )


def validation_perplexity(
    path: Path, mix: Mix, *, dtype: str = "fp32", micro_batch_size: int = 1, max_samples: int | None = None
) -> list[SourcePerplexity]:
    """Validate a run's newest checkpoint, a checkpoint or a Hugging Face directory on the mixture; one process.

    Raises:
        ConfigError: the model has fewer embedding rows than the mixture's tokenizer, or no source has held-out data.
    """
    import torch

    from megatron_mixcpt.checkpoint import newest_checkpoint, read_info
    from megatron_mixcpt.config import LossConfig
    from megatron_mixcpt.data.batch import Batch, collate
    from megatron_mixcpt.data.dataset import valid_datasets
    from megatron_mixcpt.data_prep.format import PAD
    from megatron_mixcpt.huggingface.weights import DTYPES
    from megatron_mixcpt.objectives.mixcpt import MixCPTLoss
    from megatron_mixcpt.objectives.packed_text import validation_metrics
    from megatron_mixcpt.objectives.step import ForwardBackward
    from megatron_mixcpt.runtime.parallel import parallel_context
    from megatron_mixcpt.train.validation import validate

    from_hf = is_hf_directory(path)
    adapter = None
    if from_hf:
        arch = architecture_from_hf(path)
    else:
        info = read_info(newest_checkpoint(path))
        arch, adapter = info.architecture, info.adapter
    check_vocabulary(path, arch, mix)
    with parallel_context() as state, tempfile.TemporaryDirectory() as cache:
        from megatron_mixcpt.checkpoint.start import load_model_weights
        from megatron_mixcpt.model.build import build_gpt
        from megatron_mixcpt.model.load import load_hf

        model = build_gpt(arch, params_dtype=DTYPES[dtype], seed=None, adapter=adapter)
        if from_hf:
            load_hf(model, path)
        else:
            load_model_weights(model, path)
        config = LossConfig(target="none", fuse_lm_head=True)  # a micro-batch's logits need more than the model
        loss = MixCPTLoss(config, None, group=None, vocab_start=0, vocab_size=arch.vocab_size, device=state.device)
        datasets = dict(valid_datasets(mix, seed=0, cache_dir=Path(cache)))
        total = sum(min(len(dataset), max_samples or len(dataset)) for dataset in datasets.values())
        with Progress(f"{path.name}: held-out text", total, "sequences") as progress:

            def told(batch: list[dict]) -> Batch:
                progress.advance(
                    sum(not (sample["flags"] == PAD).all() for sample in batch)
                )  # what fills it up is padding
                return collate(batch)

            metrics, _ = validate(
                datasets,
                ForwardBackward(model, loss, num_sources=micro_batch_size, contributes=True),
                told,
                validation_metrics,
                state=state,
                micro_batch_size=micro_batch_size,
                max_samples=max_samples,
                stop_requested=lambda: False,
            )
        torch.distributed.barrier()
    measured = [
        SourcePerplexity(source.name, source.kind, metrics[f"val/{source.name}/ppl"])
        for source in mix.sources
        if f"val/{source.name}/ppl" in metrics
    ]
    if not measured:
        raise ConfigError(f"{mix.path}: no source has held-out target tokens; preprocess with a larger valid_fraction")
    return measured
