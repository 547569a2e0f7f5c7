"""How much of a GPU's peak does training use? Peaks, a step's FLOPs, and the speed of a run.

Counted is what the linear maps execute, as in the benchmarks: attention, a few percent at most at
the lengths of instructions, is left out, so a utilisation is a lower bound.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from llama_adapter.config import LlamaConfig


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one GPU.

    Attributes:
        tflops: dense bfloat16 and float16 products with float32 sums, 1e12 per second.
        tflops_float32: the same in float32, outside of the tensor cores.
        tbytes: memory rate, 1e12 bytes per second.
        pattern: what the driver's name of the device matches.
        source: where the figures come from.
        tflops_float8: as tflops, in 8-bit floats; None where the tensor cores have none.
    """

    tflops: float
    tflops_float32: float
    tbytes: float
    pattern: str
    source: str
    tflops_float8: float | None = None

    def peak(self, dtype: str) -> float:
        """TFLOP/s of products in a dtype, "float8" for either form of 8-bit floats."""
        own = {"float32": self.tflops_float32, "float8": self.tflops_float8}
        return own.get(dtype) or self.tflops


# the first row whose pattern matches a name counts
GPUS = {
    "A100-40GB": Gpu(312, 19.5, 1.555, r"A100.*40GB", "NVIDIA A100 data sheet, 40 GB"),
    "A100-PCIe": Gpu(312, 19.5, 1.935, r"A100.*PCIe", "NVIDIA A100 data sheet, 80 GB PCIe"),
    "A100": Gpu(312, 19.5, 2.039, r"A100", "NVIDIA A100 data sheet, 80 GB SXM"),
    "H100": Gpu(989, 67, 3.35, r"H100 80GB HBM3", "NVIDIA H100 data sheet, SXM", 1979),
    "H200": Gpu(989, 67, 4.8, r"H200", "NVIDIA H200 data sheet, SXM", 1979),
}


def gpu_of(device_name: str) -> str | None:
    """The row of GPUS for a device's name as torch gives it; None where there is none."""
    return next((name for name, gpu in GPUS.items() if re.search(gpu.pattern, device_name)), None)


def linear_flops(
    config: LlamaConfig, tokens: int, rows: int, adapted: int, recompute: str | None = None
) -> float:
    """Executed by the linear maps of a step on a frozen base, forward and back to the prompts.

    Args:
        config: of the model.
        tokens: computed.
        rows: of logits.
        adapted: layers with a prompt, the topmost; nothing flows back below the lowest of them.
        recompute: what the backward computes again in each of these, as in recompute.py.
    """
    attention = config.dim * config.head_dim * (config.n_heads + 2 * config.kv_heads)
    output = config.n_heads * config.head_dim * config.dim
    gated = 2 * config.dim * config.hidden_dim
    rest = output + gated + config.dim * config.hidden_dim
    forward = config.n_layers * (attention + rest)
    backward = (adapted - 1) * (attention + rest) + rest
    again = {None: 0, "mlp": gated, "block": attention + output + gated}
    backward += adapted * again[recompute]
    return 2.0 * (tokens * (forward + backward) + 2 * rows * config.dim * config.vocab_size)


@dataclass(frozen=True)
class Speed:
    """How fast steps were, by their medians.

    Attributes:
        tokens_per_second: of the records, whatever was computed for them, on all devices.
        tflops: executed per second by this process's device, 1e12.
        gpu: a row of GPUS, or None where no peak is known.
        dtype: of the products.
    """

    tokens_per_second: float
    tflops: float
    gpu: str | None
    dtype: str

    @property
    def utilisation(self) -> float | None:
        """Executed FLOPs of the device's peak, or None where that is not known."""
        return None if self.gpu is None else self.tflops / GPUS[self.gpu].peak(self.dtype)

    def __str__(self) -> str:
        shown = f"{self.tokens_per_second:,.0f} record tokens/s"
        if self.gpu is None:
            return shown
        peak = f"{self.gpu}'s {GPUS[self.gpu].peak(self.dtype):g} TFLOP/s in {self.dtype}"
        return f"{shown}, utilisation {self.utilisation:.1%} of {peak}"


def speed_of(rows: Sequence[dict[str, Any]], device: torch.device, dtype: str) -> Speed | None:
    """The speed of training steps.

    Args:
        rows: lines of metrics.jsonl; those of steps have "tokens_per_second" and "tflops".
        device: that computed them.
        dtype: of the products, as `Gpu.peak` takes it.

    Returns:
        The medians over the steps; None where there is none.
    """
    steps = [row for row in rows if "tflops" in row]
    if not steps:
        return None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return Speed(
        tokens_per_second=median(row["tokens_per_second"] for row in steps),
        tflops=median(row["tflops"] for row in steps),
        gpu=gpu_of(name),
        dtype=dtype,
    )
