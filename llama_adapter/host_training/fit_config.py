"""Every option of a training loop over a task, and the learning rate of each of its steps."""

import math
from dataclasses import dataclass, field
from typing import Any

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "linear", "constant")
# what of a run with a validation split remains: the weights of its best epoch, or of its last one
KEPT = ("best", "last")
# beyond any sensible rate, count or size, and within what torch takes
_LARGEST = 1e30


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class FitConfig:
    """Training."""

    epochs: int = _option(30, "passes over the training items")
    batch_size: int = _option(16, "items per optimiser step")
    lr: float = _option(1e-3, "largest learning rate")
    head_lr: float | None = _option(None, "that of the task head; default: lr")
    optimizer: str = _option("adamw", "how gradients become steps", OPTIMIZERS)
    momentum: float = _option(0.9, "of sgd")
    betas: tuple[float, float] = _option((0.9, 0.999), "AdamW's two decay rates")
    weight_decay: float = _option(0.0, "decay of matrices; vectors have none")
    schedule: str = _option("cosine", "how the learning rate falls, to zero at the end", SCHEDULES)
    warmup_epochs: float = _option(0.0, "epochs of warm-up, before the schedule")
    warmup_lr: float | None = _option(
        None, "learning rate held during the warm-up; default: it rises from zero in a line"
    )
    clip: float | None = _option(None, "largest norm of the gradient; default: no limit")
    seed: int = _option(0, "of new parameters, the items' order, dropout and augmentation")
    eval_every: int = _option(1, "epochs between validations; the last one always has one")
    keep: str = _option("best", "the epoch that remains, by the validation's score", KEPT)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "eval_every"):
            if not 1 <= getattr(self, name) <= _LARGEST:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "head_lr", "warmup_lr", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= _LARGEST:
                raise ValueError(f"{name} must be from 0 to {_LARGEST:g}, got {value}")
        for name, values in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("keep", KEPT)):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {values}, got {getattr(self, name)!r}")
        if not 0 <= self.warmup_epochs <= self.epochs:
            limit = f"from 0 to epochs = {self.epochs}"
            raise ValueError(f"warmup_epochs must be {limit}, got {self.warmup_epochs}")
        if not all(0 <= value < 1 for value in (*self.betas, self.momentum)):
            got = f"{self.betas} and {self.momentum}"
            raise ValueError(f"betas and momentum must be from 0 to below 1, got {got}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, got {self.clip}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")


def learning_rates(config: FitConfig, epoch: float) -> tuple[float, float]:
    """Warm-up over w epochs, then the schedule, by fractional epoch e of E.

        peak * e / w, or warmup_lr where that is given     for e < w
        peak * (1 + cos(pi p)) / 2, p = (e - w) / (E - w)  cosine
        peak * (1 - p)                                     linear
        peak                                               constant

    Args:
        config: the options named above; peak is lr, and head_lr of the head.
        epoch: e, optimiser steps done over the steps of one epoch.

    Returns:
        The next step's learning rates: of the method's parameters, and of the head's.
    """
    peaks = config.lr, config.lr if config.head_lr is None else config.head_lr
    warmup = config.warmup_epochs
    if epoch < warmup:
        if config.warmup_lr is not None:
            return config.warmup_lr, config.warmup_lr
        share = epoch / warmup
    else:
        progress = min((epoch - warmup) / max(config.epochs - warmup, 1e-9), 1.0)
        share = {
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
            "linear": 1 - progress,
            "constant": 1.0,
        }[config.schedule]
    return peaks[0] * share, peaks[1] * share
