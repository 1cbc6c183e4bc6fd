"""Packaging of megatron-mixcpt.

The folders `kernels/`, `data_prep/` and `launch/` sit at the top of the repository and belong to the package: links in
`megatron_mixcpt/` make them its own for Python, mypy and editors alike. A top-level import name `kernels` would
overwrite the Hugging Face package of that name, which transformers imports.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_mixcpt/__init__.py").read_text()).group(1)

setup(
    name="megatron-mixcpt",
    version=VERSION,
    description="Distributed continual pre-training that makes a general LLM a domain expert without forgetting",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["megatron_mixcpt", "megatron_mixcpt.*"]), "megatron_mixcpt.launch"],
    package_data={
        "megatron_mixcpt": ["py.typed"],
        "megatron_mixcpt.demo": ["data/*"],
        "megatron_mixcpt.evaluate": ["tasks/*"],
        "megatron_mixcpt.launch": ["*.sbatch", "*.sh", "*.md", "configs/*", "configs/*/*"],
        "megatron_mixcpt.report": ["page.css", "page.js"],
        "megatron_mixcpt.recall": ["data/*"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "megatron-core>=0.16.1,<0.17",
        "deepspeed>=0.16",
        "transformers>=4.56",
        "datasets>=3.0",
        "sentencepiece>=0.2",
        "wandb>=0.18",
        "safetensors>=0.4.3",
        "tokenizers>=0.22",
        "numpy>=1.26",
        "psutil>=5.9",  # megatron-core's checkpoint writer dies without it
        "pydantic>=2.7",
        "omegaconf>=2.3",
        "rich>=13.0",
        "orjson>=3.9",
        "pyarrow>=15.0",
        "xxhash>=3.4.1",
        "jinja2>=3.1",
        "pyyaml>=6.0",
        "zstandard>=0.22",
        "rensa>=0.5",
        "fastokens>=0.3.5; platform_system == 'Linux'",
    ],
    extras_require={
        "dev": [
            "matplotlib>=3.8",  # reads the pictures that tests take of pages
            "peft>=0.17",
            "pytest>=8.2",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "mypy>=1.11",
            "import-linter>=2.6",
            "types-PyYAML",
            "wandb-workspaces>=0.4",
        ],
        "demo": ["gguf>=0.10", "accelerate>=1.0"],
        "eval": ["lm-eval[hf]>=0.4.5"],
        "dashboard": ["wandb-workspaces>=0.4"],  # launch/wandb_dashboard.py
        # What benchmarks/lssd_gpu.py stands beside; each is left out where it is missing.
        "bench-gpu": ["liger-kernel>=0.8", "speculators", "nvidia-modelopt", "flash-linear-attention", "quack-kernels"],
    },
    entry_points={"console_scripts": ["mixcpt = megatron_mixcpt.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
    ],
)
