"""One distribution, two import packages: llama_adapter and adapter_kernels.

`kernels/` is a source root, not a package: Hugging Face owns the import name `kernels`.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

TOKENIZERS = ["tokenizers>=0.22", "tiktoken>=0.8"]
HF = [
    "transformers>=5.10.1", "peft>=0.18", "accelerate>=1.0", "pyyaml>=6", "pillow>=11", *TOKENIZERS
]  # fmt: skip
PLOT = ["matplotlib>=3.8"]
LOG = ["tensorboard>=2.16"]
# the first that is made for torch 2.11
QUANT = ["torchao>=0.17"]
OCR = ["pytesseract>=0.3.13"]
# 100 MB, so no part of what a newcomer installs
EVAL = ["pycocoevalcap>=1.2"]
# what owns the scores that tests hold ours to
SCORERS = ["seqeval>=1.2.2", "torchmetrics>=1.4"]
TEST = [*HF, *PLOT, *LOG, *QUANT, *OCR, "pytest>=8", "pytest-xdist>=3.5"]

setup(
    name="llama-adapter-kernels",
    version="0.1.0",
    description="LLaMA-Adapter with fused zero-init attention: fine-tune, generate, serve",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(".", include=["llama_adapter", "llama_adapter.*"]),
        *find_packages("kernels", include=["adapter_kernels", "adapter_kernels.*"]),
    ],
    package_dir={
        "llama_adapter": "llama_adapter",
        "adapter_kernels": "kernels/adapter_kernels",
    },
    package_data={
        "llama_adapter": [
            "assets/README.md",
            "assets/*.json",
            "assets/*/*",
            "host_training/recipes/*.yaml",
        ],
        "adapter_kernels": ["*.cpp", "*.h"],
    },
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "sentencepiece>=0.2",
        "tqdm>=4.66",
        "packaging>=23",
        "ninja>=1.11",
        *PLOT,
        *LOG,
    ],
    extras_require={
        "hf": HF,
        "tokenizers": TOKENIZERS,
        "quant": QUANT,
        "ocr": OCR,
        "eval": EVAL,
        "test": TEST,
        "dev": [*TEST, *EVAL, *SCORERS, "ruff>=0.15", "pyright[nodejs]>=1.1.400"],
    },
    entry_points={"console_scripts": ["llama-adapter = llama_adapter.__main__:main"]},
)
