"""Which base model an adapter was trained on: its shape and a few hundred of its weights.

A fingerprint is the same for every dtype a base is loaded in and for Meta's and Hugging Face's row
order of wq and wk, which it leaves out. It tells bases of one shape apart by their weights.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_adapter.config import LlamaConfig
from llama_adapter.model import Llama

# relative difference between the same weight in two dtypes: bf16 keeps 8 bits, an error of 0.4 %
RELATIVE_TOLERANCE = 0.01
# float16 has no finer steps than 6e-8 near zero
ABSOLUTE_TOLERANCE = 1e-7
SAMPLES_PER_TENSOR = 32
# what the shape of a base is; the rest of its configuration changes no tensor
SHAPE_FIELDS = ("dim", "n_layers", "n_heads", "kv_heads", "head_dim", "hidden_dim", "vocab_size")
MODEL_TENSORS = ("tok_embeddings.weight", "norm.weight")
LAYER_TENSORS = (
    "attention_norm.weight",
    "ffn_norm.weight",
    "attention.wv.weight",
    "feed_forward.w2.weight",
)


@dataclass(frozen=True)
class Fingerprint:
    """A base model's identity.

    Attributes:
        name: what to call it in messages; not compared.
        shape: the fields of SHAPE_FIELDS.
        samples: weights at fixed positions of the tensors of `sampled_tensors`.
    """

    name: str
    shape: dict[str, int]
    samples: tuple[float, ...]

    def describe(self) -> str:
        """Name and shape in one line."""
        values = ", ".join(f"{name} {value}" for name, value in self.shape.items())
        return f"{self.name!r} ({values})"

    def difference(self, other: "Fingerprint") -> str | None:
        """Why `other` is another base model, in a few words; None where it is the same one."""
        names = [name for name in SHAPE_FIELDS if self.shape[name] != other.shape[name]]
        if names:
            return ", ".join(f"{name} {self.shape[name]} and {other.shape[name]}" for name in names)
        differing = sum(
            not math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)
            for a, b in zip(self.samples, other.samples, strict=True)
        )
        if differing:
            return f"one shape, but {differing} of {len(self.samples)} sampled weights differ"
        return None


def shape_of(config: LlamaConfig) -> dict[str, int]:
    """The fields of a configuration that decide the tensors' shapes."""
    return {name: getattr(config, name) for name in SHAPE_FIELDS}


def sampled_tensors(n_layers: int) -> list[str]:
    """Names of the tensors whose weights are sampled: both ends, lowest, middle and top layer."""
    layers = sorted({0, n_layers // 2, n_layers - 1})
    return [
        *MODEL_TENSORS,
        *(f"layers.{layer}.{name}" for layer in layers for name in LAYER_TENSORS),
    ]


def sample_count(n_layers: int) -> int:
    """Number of weights in the fingerprint of a model of `n_layers`."""
    return SAMPLES_PER_TENSOR * len(sampled_tensors(n_layers))


def fingerprint(model: Llama, name: str) -> Fingerprint:
    """Take a base model's fingerprint.

    Args:
        model: the base, in any floating dtype, on any device.
        name: what to call it in messages.

    Returns:
        Its shape and 32 weights, to five digits, of each tensor in `sampled_tensors`.

    Raises:
        ValueError: a sampled weight is NaN or infinite.
    """
    parameters = dict(model.named_parameters())
    samples: list[float] = []
    for tensor_name in sampled_tensors(model.config.n_layers):
        values = _sample(parameters[tensor_name].detach())
        if not all(map(math.isfinite, values)):
            raise ValueError(f"base {name!r} has weights that are not finite in {tensor_name}")
        samples.extend(values)
    return Fingerprint(name, shape_of(model.config), tuple(samples))


def _sample(tensor: Tensor) -> list[float]:
    # multiples of the golden ratio spread evenly over any size, in integers on every platform
    size = tensor.numel()
    ratio = 0x9E3779B97F4A7C15
    positions = [((i * ratio % 2**64) * size) >> 64 for i in range(1, SAMPLES_PER_TENSOR + 1)]
    index = torch.tensor(positions, device=tensor.device)
    values = tensor.reshape(-1)[index].float().tolist()
    return [float(f"{value:.5g}") for value in values]
