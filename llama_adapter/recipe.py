"""The papers' recipe: every option of a training run with its default, and the learning rate.

It is that of LLaMA-Adapter, section 4.1, with schedule, decay and scaling of the learning rate as
in its official training code.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama_adapter.config import (
    EARLY_LAYERS,
    EARLY_TOKENS,
    FUSIONS,
    AdapterConfig,
    VisualConfig,
)
from llama_adapter.recompute import RECOMPUTED
from llama_adapter.tuning import TuningOptions
from llama_adapter.vision import ScaleOptions, VisionOptions

DTYPES = ("float32", "bfloat16", "float16")
# formats of the base's weights that pass gradients
QUANTIZED = ("int8", "nf4", "fp8")
# how batches of pictures and of text take turns; "off" mixes them and trains everything on each
JOINT = ("off", "alternate", "proportional", "concat")
# beyond any sensible rate, count or size, and within what torch takes
_LARGEST = 1e30
# more ends the process, not the run
_MOST_THREADS = 1024


def _option(
    default: Any, help: str, choices: tuple[str, ...] | None = None, recipe: bool = False
) -> Any:
    """A field; `recipe` marks what decides the result, as against where and how it is computed."""
    return field(default=default, metadata={"help": help, "choices": choices, "recipe": recipe})


def _recipe(default: Any, help: str) -> Any:
    return _option(default, help, recipe=True)


@dataclass(frozen=True)
class FusionOptions:
    """How an image reaches the layers."""

    fusion: str = _option(
        "late",
        "late adds a token of the image to every prompt row, as in LLaMA-Adapter; early makes "
        "tokens of it a gated prompt of their own in the first layers, as in V2",
        FUSIONS,
        recipe=True,
    )
    visual_tokens: int | None = _recipe(
        None, f"tokens of an image; default: {EARLY_TOKENS} for early fusion, 1 for late"
    )
    visual_layers: int | None = _recipe(
        None, f"first layers that see them, of early fusion; default: {EARLY_LAYERS}"
    )
    projector_hidden: tuple[int, ...] = _recipe(
        (64,), "widths between an image's features and its tokens"
    )

    def __post_init__(self) -> None:
        # what does not go together is said by whoever takes it
        VisualConfig(1, **self.shape)

    @property
    def shape(self) -> dict[str, Any]:
        """Those fields of a `VisualConfig`."""
        tokens, layers = (EARLY_TOKENS, EARLY_LAYERS) if self.fusion == "early" else (1, 0)
        return {
            "hidden": tuple(self.projector_hidden),
            "fusion": self.fusion,
            "tokens": tokens if self.visual_tokens is None else self.visual_tokens,
            "layers": layers if self.visual_layers is None else self.visual_layers,
        }


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tuning options; the defaults are the papers' recipe."""

    data: Path = field(
        metadata={
            "help": "Alpaca records, conversations or both, some with images: JSON or .jsonl",
            "recipe": False,
        }
    )
    output: Path = field(metadata={"help": "run folder to create", "recipe": False})
    base: Path | None = field(
        default=None,
        metadata={
            "help": "folder of the base model, Meta's, Hugging Face's or litgpt's; default: the "
            "bundled one",
            "recipe": False,
        },
    )
    dtype: str | None = _option(None, "dtype of the base; default: the files' own", DTYPES)
    device: str | None = _option(None, "where to compute; default: the GPU, if there is one")
    quantize: str | None = _option(
        None,
        "hold the base's linear weights in 8 or 4 bits, by torchao; fp8 for speed, from sm_89 on",
        QUANTIZED,
    )
    shard: bool = _option(
        False, "split the base over torchrun's processes, by FSDP2: none of them holds all of it"
    )
    val_data: Path | None = field(
        default=None,
        metadata={"help": "file to validate on, in place of part of the data", "recipe": False},
    )
    val_size: int | None = _option(None, "records held out; default: the val fraction")
    val_fraction: float = _option(0.02, "part of the records held out")
    strict: bool = _option(False, "refuse data with a record that cannot be used")
    max_length: int = _recipe(512, "tokens kept per record, within the model's context")
    epochs: int = _recipe(5, "passes over the data")
    warmup_epochs: float | None = _recipe(
        None, "epochs of linear warm-up, before the cosine; default: 2 of every 5"
    )
    max_steps: int | None = _option(None, "stop after so many steps of the unchanged schedule")
    batch_size: int = _recipe(64, "records per optimiser step")
    micro_batch_tokens: int = _option(
        2048, "tokens per forward pass; changes memory and time, not results"
    )
    recompute: str | None = _option(
        None,
        "part of each layer that is computed again, not kept; changes memory and time, not results",
        RECOMPUTED,
    )
    base_lr: float = _recipe(9e-3, "learning rate per 256 records of a batch")
    lr: float | None = _recipe(None, "learning rate; default: base lr * batch size / 256")
    min_lr: float = _recipe(0.0, "learning rate that the cosine ends at")
    weight_decay: float = _recipe(
        0.02, "AdamW's decay, of prompts and gates alike; biases, scales and norms have none"
    )
    betas: tuple[float, float] = _recipe((0.9, 0.95), "AdamW's two decay rates")
    clip: float | None = _recipe(None, "largest norm of the gradient; default: no limit")
    joint: str = _option(
        "off",
        "other than off: batches are of pictures, which train the projector, or of text, which "
        "train the rest; alternate takes one of each in turn, proportional spreads those of the "
        "rarer kind evenly, concat shuffles them",
        JOINT,
        recipe=True,
    )
    seed: int = _option(0, "of the prompts' initial values, the held-out choice and the order")
    save_every: int = _option(50, "optimiser steps between checkpoints")
    keep_checkpoints: int = _option(2, "checkpoints kept")
    token_cache: Path | None = field(
        default=None,
        metadata={
            "help": "folder that keeps data as tokens; default: $LLAMA_ADAPTER_CACHE/tokens, or "
            "among the user's caches",
            "recipe": False,
        },
    )
    threads: int | None = _option(None, "CPU threads; default: torch's choice")
    profile: bool = _option(False, "write a trace and a table of where a few steps' time goes")
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    tuning: TuningOptions = field(default_factory=TuningOptions)
    vision: VisionOptions = field(default_factory=VisionOptions)
    scales: ScaleOptions = field(default_factory=ScaleOptions)
    projector: FusionOptions = field(default_factory=FusionOptions)

    def __post_init__(self) -> None:
        for name in (
            "epochs",
            "batch_size",
            "micro_batch_tokens",
            "save_every",
            "keep_checkpoints",
        ):
            if not 1 <= getattr(self, name) <= _LARGEST:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")
        for name in ("base_lr", "min_lr", "weight_decay", "lr", "val_size"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= _LARGEST:
                raise ValueError(f"{name} must be from 0 to {_LARGEST:g}, got {value}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be from 0 to below 1, got {self.val_fraction}")
        if not 0 <= self.warmup <= self.epochs:
            limit = f"from 0 to epochs = {self.epochs}"
            raise ValueError(f"warmup_epochs must be {limit}, got {self.warmup_epochs}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be from 0 to below 1, got {self.betas}")
        if self.threads is not None and not 1 <= self.threads <= _MOST_THREADS:
            raise ValueError(f"threads must be from 1 to {_MOST_THREADS}, got {self.threads}")
        for name in ("clip", "max_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.val_data is not None and self.val_size is not None:
            raise ValueError("val_size must be left out where val_data is given")
        if self.quantize is not None and self.quantize not in QUANTIZED:
            raise ValueError(f"quantize must be one of {QUANTIZED} to train, got {self.quantize!r}")
        if self.recompute not in (None, *RECOMPUTED):
            raise ValueError(f"recompute must be one of {RECOMPUTED}, got {self.recompute!r}")
        if self.shard and self.quantize is not None:
            raise ValueError(
                f"quantize must be left out with shard, got {self.quantize!r}: such weights cannot "
                "be split over processes"
            )
        if self.shard and self.tuning.tune:
            raise ValueError(
                f"tune must be left out with shard, got {self.tuning.tune}: no process holds the "
                "layers that it changes"
            )
        if self.joint not in JOINT:
            raise ValueError(f"joint must be one of {JOINT}, got {self.joint!r}")
        pair = {name: getattr(self.vision, name) for name in ("images", "vision_model")}
        given = [f"{name} = {path}" for name, path in pair.items() if path is not None]
        if len(given) == 1:
            raise ValueError(f"images and vision_model must be given together, got {given[0]}")
        if self.joint != "off" and not given:
            raise ValueError(f"images and vision_model must be given for joint = {self.joint}")
        if self.projector.fusion == "early" and not given:
            raise ValueError("images and vision_model must be given for fusion = early")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype!r}")

    def absolute(self) -> "FinetuneConfig":
        """The same from any working directory, but for the run folder."""

        def whole(options: Any, *names: str) -> dict[str, Path | None]:
            held: dict[str, Path | None] = {name: getattr(options, name) for name in names}
            return {name: path and path.absolute() for name, path in held.items()}

        vision = replace(
            self.vision, **whole(self.vision, "vision_model", "images", "feature_cache")
        )
        own = whole(self, "data", "val_data", "base", "token_cache")
        return replace(self, vision=vision, **own)

    @property
    def peak_lr(self) -> float:
        """lr, or base_lr * batch_size / 256: 2.25e-3 for the papers' batch of 64."""
        return self.base_lr * self.batch_size / 256 if self.lr is None else self.lr

    @property
    def warmup(self) -> float:
        """warmup_epochs, or the papers' share of the epochs: 2 of 5."""
        return self.epochs * 2 / 5 if self.warmup_epochs is None else self.warmup_epochs


def learning_rate(config: FinetuneConfig, epoch: float) -> float:
    """Linear warm-up, then a cosine, by fractional epoch e.

        peak * e / w                                             for e < w
        min + (peak - min) / 2 * (1 + cos(pi (e - w) / (E - w)))  from there on

    Args:
        config: peak_lr, min_lr, warmup w and epochs E.
        epoch: e, from 0 to E: optimiser steps done, over the steps of one epoch.

    Returns:
        The learning rate of the next step. The first one is 0, as in the official recipe.
    """
    peak, warmup = config.peak_lr, config.warmup
    if epoch < warmup:
        return peak * epoch / warmup
    progress = (epoch - warmup) / max(config.epochs - warmup, 1e-9)
    return config.min_lr + (peak - config.min_lr) / 2 * (1 + math.cos(math.pi * min(progress, 1)))
