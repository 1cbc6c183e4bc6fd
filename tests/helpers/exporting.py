"""A model in memory to Hugging Face by the way that a trained one goes: a run's checkpoint, then `mixcpt export`."""

from pathlib import Path

import torch.distributed as dist
import yaml

from megatron_mixcpt.checkpoint import save_checkpoint
from megatron_mixcpt.convert.export import export


def export_model(model, out, hf=None, dtype=None):
    """Write `out`; every rank calls.

    hf: what the run says it started from; without, a preset. dtype: fp32 or bf16, of the written weights.
    """
    run = Path(f"{out}-run")
    checkpoint = save_checkpoint(run / "checkpoints", 1, model)
    if dist.get_rank() == 0:
        config = {
            "model": {"hf": str(hf)} if hf else {"preset": "tiny"},
            "data": {"mix": "gone.json"},
            "loss": {"target": "none"},
            "train": {
                "steps": 2,
                "global_batch_size": 1,
                "lr": 1.0,
                "schedule": "constant",
                "dtype": "fp32",
                "seed": 0,
            },
            "run_dir": "unused",
        }
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        export(checkpoint, Path(out), dtype)
    dist.barrier()
