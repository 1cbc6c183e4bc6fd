"""`mixcpt`, refusing every kernel that may give other bits the next time: `python -m benchmarks.gpu.deterministic`."""

import os
import sys

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS is loaded

import torch

from megatron_mixcpt.cli import main

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    sys.exit(main())
