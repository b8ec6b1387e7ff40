"""Install with `pip install -c constraints.txt -e .`; the constraints are the versions that were tested."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "starflow2_jax/__init__.py").read_text(), re.MULTILINE)[1]
README = ROOT / "README.md"

# The versions that were tested are in constraints.txt; these are the bounds within which we expect the same.
CORE = (
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "tensorstore>=0.1.86",
    "ml_dtypes>=0.5",
    "absl-py>=2.1",
    "grain>=0.2.18",
    "ml-collections>=1.1",
    "tensorflow-datasets>=4.9.10",
    "transformers>=5.0,<6",
    "tokenizers>=0.22",
    "jinja2>=3.1",  # transformers' chat templates
    "safetensors>=0.6",
    "numpy>=2.1,<3",
    "pillow>=11",
    "tqdm>=4.66",
    "tensorboardX>=2.6",
    "scikit-learn>=1.6",  # the quickstart's digits come with it, so a plain installation has it
    "scipy>=1.13",  # which JAX needs, too
    "matplotlib>=3.10",
)
TORCH = "torch>=2.9,<3"  # only to read .pt and .pth files, and as a reference in tests
SERVE = ("starlette>=1.0,<2", "uvicorn>=0.40,<1")
CUDA = "jax[cuda12]>=0.10.2"
TPU = "jax[tpu]>=0.10.2"  # brings the libtpu that fits: the compiler, which needs no TPU

setup(
    name="starflow2_jax",
    version=VERSION,
    description="STARFlow2 in JAX: one causal model that reads and writes text and images",
    long_description=README.read_text() if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["starflow2_jax*"]),
    package_data={"starflow2_jax.serving": ["page.html"]},
    install_requires=CORE,
    extras_require={
        "torch": [TORCH],
        "tpu": [TPU],
        "gpu": [CUDA],
        "cuda": [CUDA],
        "cuda13": ["jax[cuda13]>=0.10.2"],
        "serve": SERVE,
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.14",
            "openai>=2,<4",
            "httpx>=0.28",
            "selenium>=4.30",
            *SERVE,
            TORCH,
        ],
    },
    entry_points={"console_scripts": ["starflow2 = starflow2_jax.cli:main"]},
)
