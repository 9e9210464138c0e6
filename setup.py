"""All of bivec's packaging metadata; `pyproject.toml` configures tools only."""

from pathlib import Path

from setuptools import setup

# each layer stands in a top-level folder and is linked into the package, so that only `bivec` is ever installed
LAYERS = ("kernels", "texts", "engine", "training", "serving", "evaluation", "benchmarks")
ROOT = Path(__file__).parent
PACKAGES = [
    "bivec",
    *(f"bivec.{layer}" for layer in LAYERS),
    *(f"bivec.{layer}.{file.parent.name}" for layer in LAYERS for file in sorted(ROOT.glob(f"{layer}/*/__init__.py"))),
]

setup(
    name="bivec",
    version="0.1.0",
    description="Turn a pretrained Llama into a text encoder and run it as fast as the hardware allows.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=PACKAGES,
    package_data={
        "bivec": ["py.typed"],
        "bivec.engine": ["default_model/*", "default_model/*/*", "fastest_attention.json", "published.json"],
        "bivec.kernels.attention": ["tiles.json"],
    },
    entry_points={"console_scripts": ["bivec = bivec.cli:main"]},
    install_requires=[
        "torch>=2.11,<2.16",
        "triton>=3.6; sys_platform == 'linux'",
        "transformers>=5.3,<6",
        "huggingface-hub>=1.0",
        "tokenizers>=0.22",
        "peft>=0.18",
        "accelerate>=1.15",
        "safetensors>=0.8",
        "numpy>=2.0",
        "pyarrow>=20",
        "typer>=0.20",
        "tqdm>=4.66",
    ],
    extras_require={
        "flash": ["flash-attn>=2.7"],
        "eval": ["scikit-learn>=1.5", "scipy>=1.13", "matplotlib>=3.9", "mteb>=2.3"],
        "gguf": ["gguf>=0.19"],
        "ray": ["ray>=2.56"],
        "bench": [
            "pytest-benchmark>=5",
            "matplotlib>=3.9",
            "sentence-transformers>=6",
            "liger-kernel>=0.6",
            "openvino>=2026.1",
            "nncf>=3.0",
        ],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.150",
            "sentence-transformers>=6",
            "gguf>=0.19",
            "scikit-learn>=1.5",
            "scipy>=1.13",
            "matplotlib>=3.9",
            "setuptools>=77",
            "wheel",
            "ruff>=0.14",
            "mypy>=1.18",
        ],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
