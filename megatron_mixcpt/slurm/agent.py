"""torchrun on a node of a SLURM job, where it can be told how long its workers may take to save."""

import sys
from importlib import metadata


def main() -> int | None:
    """`torchrun sys.argv`; returns 2 with a torch whose torchrun cannot wait longer than 30 seconds after a signal."""
    version = metadata.version("torch")
    if tuple(map(int, version.split(".")[:2])) < (2, 12):
        print(f"error: the style torchrun needs torch 2.12 or newer, this is {version}: take srun", file=sys.stderr)
        return 2
    from torch.distributed.run import main as torchrun

    torchrun()
    return None


if __name__ == "__main__":
    sys.exit(main())
