"""What an exported model came from: a training run, or a converted checkpoint."""

from dataclasses import dataclass
from pathlib import Path

from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.checkpoint import CheckpointInfo, find_checkpoint, newest_checkpoint, read_info
from megatron_mixcpt.checkpoint.manifest import fingerprint
from megatron_mixcpt.config import AdapterConfig, Config, ModelConfig, load_config
from megatron_mixcpt.data_prep.mix import Mix, read_mix
from megatron_mixcpt.errors import ConfigError, VerificationError
from megatron_mixcpt.huggingface.config import architecture_from_hf
from megatron_mixcpt.huggingface.weights import weights_fingerprint


@dataclass(frozen=True)
class Origin:
    """A checkpoint and where the rest of its Hugging Face directory is carried over from."""

    checkpoint: Path
    info: CheckpointInfo
    run_dir: Path | None
    config: Config | None  # the run's; None for a converted checkpoint
    mix: Mix | None  # the run's; None if it is gone
    base: Path | None  # the model that the run started from: a Hugging Face directory, a checkpoint or a run
    source_dir: Path | None  # config.json and generation_config.json
    tokenizer_dir: Path | None

    @property
    def arch(self) -> Architecture:
        return self.info.architecture

    @property
    def adapter(self) -> AdapterConfig | None:
        """What the checkpoint holds in place of the weights; they are those of `base`."""
        return self.info.adapter


def find_origin(path: Path, *, verify: bool = True, allow_older: bool = False) -> Origin:
    """`path`: a run directory, one of its checkpoints, or a checkpoint that `mixcpt convert` wrote.

    Args:
        verify: compare the checkpoint with its hashes; without, the newest one is taken as it is.
        allow_older: see `find_checkpoint`.

    Raises:
        VerificationError: it holds no complete checkpoint, or the newest one is damaged.
        ConfigError: the run started from a Hugging Face directory that is gone.
    """
    checkpoint = find_checkpoint(path, allow_older=allow_older) if verify else newest_checkpoint(path)
    info = read_info(checkpoint)
    if (checkpoint / "hf").is_dir():
        return Origin(checkpoint, info, None, None, None, None, checkpoint / "hf", checkpoint / "hf")
    run_dir = checkpoint.parent.parent
    config = run_config(checkpoint)
    mix_path = Path(config.data.mix)
    mix = read_mix(mix_path) if mix_path.exists() else None
    tokenizer = mix.tokenizer.path if mix else None
    start = config.model.checkpoint
    if start:
        source = find_origin(Path(start), verify=False).source_dir
        return Origin(checkpoint, info, run_dir, config, mix, Path(start), source, tokenizer)
    base = config.model.hf
    if base and not Path(base).is_dir():
        raise ConfigError(
            f"{run_dir}/config.yaml: model.hf is {base}, which is not there; its config.json and tokenizer are "
            "carried over, so put it back, or run this where the run was started"
        )
    source = Path(base) if base else None
    return Origin(checkpoint, info, run_dir, config, mix, source, source, tokenizer)


def hf_base(config: Config | None, arch: Architecture, adapter: AdapterConfig) -> Path | None:
    """The Hugging Face directory whose weights a run's adapter stands beside, where transformers loads just those.

    Args:
        config: the run's; None where there was no run.
    """
    if config is None:
        return None
    hf, start = config.model.hf, config.model.checkpoint
    if hf:
        # Rows that the run added for new tokens are not in it, and a GGUF file needs to be named.
        whole = architecture_from_hf(hf).vocab_size == arch.vocab_size and (Path(hf) / "config.json").is_file()
        return Path(hf).resolve() if whole else None
    if start:
        origin = find_origin(Path(start), verify=False)  # of descriptions alone: this is asked at every save
        if goes_on(origin.adapter, adapter):
            return hf_base(origin.config, arch, adapter)
    return None


def check_start(checkpoint: Path, info: CheckpointInfo, model: ModelConfig) -> None:
    """Raise VerificationError unless the weights that a run started from are still where it found them.

    Args:
        checkpoint: of the run, with its description.
        model: section of the run's configuration.
    """
    now: str | None
    if model.hf:
        now, where = weights_fingerprint(model.hf), model.hf
    elif model.checkpoint:
        now, where = fingerprint(newest_checkpoint(Path(model.checkpoint))), model.checkpoint
    else:
        return
    start = info.training.start if info.training else None
    if start is not None and now != start.weights:
        raise VerificationError(
            f"{checkpoint} was trained from other weights than {where} holds now: put those back (of a run that went "
            "on, keep the checkpoint it was: checkpoint.keep_every), or name a copy where the command has --base"
        )


def goes_on(start: AdapterConfig | None, adapter: AdapterConfig | None) -> bool:
    """Whether a run with `adapter` that starts from one with `start` goes on with its adapters."""
    return start is not None and adapter is not None and start.shape == adapter.shape


def run_config(checkpoint: Path) -> Config:
    """The configuration of the run that a checkpoint stands in. Raises ConfigError where it stands in none."""
    path = checkpoint.parent.parent / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{checkpoint} stands in no run directory: there is no {path}")
    return load_config(Config, path, literal=True)
