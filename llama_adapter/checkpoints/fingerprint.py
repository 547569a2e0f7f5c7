"""Which base model an adapter was trained on: its shape, and some weights of every tensor.

A fingerprint is the same for every dtype a base is loaded in and for Meta's and Hugging Face's row
order of wq and wk, of which whole columns count. It tells bases of one shape apart.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_adapter.checkpoints.quantize import is_quantized
from llama_adapter.config import SHAPE_FIELDS, shape_of
from llama_adapter.model import Llama
from llama_adapter.sharding import columns, elements

# relative difference between the same weight in two dtypes: bf16 keeps 8 bits, an error of 0.4 %
RELATIVE_TOLERANCE = 0.01
# float16 has no finer steps than 6e-8 near zero
ABSOLUTE_TOLERANCE = 1e-7
MODEL_SAMPLES, LAYER_SAMPLES = 32, 4
MODEL_TENSORS = ("tok_embeddings.weight", "norm.weight", "output.weight")
LAYER_TENSORS = (
    "attention_norm.weight",
    "ffn_norm.weight",
    "attention.wq.weight",
    "attention.wk.weight",
    "attention.wv.weight",
    "attention.wo.weight",
    "feed_forward.w1.weight",
    "feed_forward.w2.weight",
    "feed_forward.w3.weight",
)
# whose rows Meta and Hugging Face order differently within a head
REORDERED = ("wq.weight", "wk.weight")


@dataclass(frozen=True)
class Fingerprint:
    """A base model's identity.

    Attributes:
        name: what to call it in messages; not compared.
        shape: the fields of SHAPE_FIELDS; of an adapter from elsewhere those that are known.
        samples: weights at fixed positions of the tensors of `sampled_tensors`, in their order; of
            wq and wk root mean squares of columns. None at all where the weights are not known.
    """

    name: str
    shape: dict[str, int]
    samples: tuple[float, ...]

    def describe(self) -> str:
        """Name and shape in one line."""
        values = ", ".join(f"{name} {value}" for name, value in self.shape.items())
        return f"{self.name!r} ({values})"

    def difference(self, other: "Fingerprint") -> str | None:
        """Why `other` is another base model, in a few words; None where it is the same one.

        What one of them does not know is not compared.
        """
        known = [name for name in SHAPE_FIELDS if name in self.shape and name in other.shape]
        names = [name for name in known if self.shape[name] != other.shape[name]]
        if names:
            return ", ".join(f"{name} {self.shape[name]} and {other.shape[name]}" for name in names)
        if not self.samples or not other.samples:
            return None
        differing = count_differing(self.samples, other.samples)
        if differing:
            return f"one shape, but {differing} of {len(self.samples)} sampled weights differ"
        return None


def count_differing(some: Sequence[float], others: Sequence[float]) -> int:
    """How many of equally many sampled weights are not the same in any dtype."""
    return sum(
        not math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE)
        for a, b in zip(some, others, strict=True)
    )


def rounded(values: Sequence[float]) -> tuple[float, ...]:
    """Weights as files keep them, to five digits."""
    return tuple(float(f"{value:.5g}") for value in values)


def sampled_tensors(n_layers: int) -> dict[str, int]:
    """Names of the tensors that are sampled, every one of the model, and how often each is."""
    found: dict[str, int] = dict.fromkeys(MODEL_TENSORS, MODEL_SAMPLES)
    for layer in range(n_layers):
        found |= {f"layers.{layer}.{name}": LAYER_SAMPLES for name in LAYER_TENSORS}
    return found


def sample_count(n_layers: int) -> int:
    """Number of samples in the fingerprint of a model of `n_layers`."""
    return sum(sampled_tensors(n_layers).values())


def fingerprint(model: Llama, name: str) -> Fingerprint:
    """Take a base model's fingerprint.

    Args:
        model: the base, in any floating dtype, on any device.
        name: what to call it in messages.

    Returns:
        Its shape and the samples of each tensor in `sampled_tensors`, to five digits.

    Raises:
        ValueError: a sampled weight is NaN or infinite, or the base is quantised.
    """
    if is_quantized(model):
        raise ValueError(
            f"base {name!r} is quantised, and its fingerprint must be taken before: load_base "
            "returns it as Base.fingerprint, and load_adapter takes it as base="
        )
    # a tied output is the embedding, once more
    parameters = dict(model.named_parameters()) | {"output.weight": model.output_weight}
    return fingerprint_of(parameters, shape_of(model.config), name)


def fingerprint_of(
    parameters: Mapping[str, Tensor], shape: dict[str, int], name: str
) -> Fingerprint:
    """Take the fingerprint of weights, wherever they lie.

    Args:
        parameters: by Meta's names, among them all of `sampled_tensors`; wq and wk in Meta's or
            Hugging Face's order of rows.
        shape: the fields of SHAPE_FIELDS.
        name: what to call the base in messages.

    Raises:
        ValueError: a sampled weight is NaN or infinite.
    """
    samples: list[float] = []
    for tensor_name, count in sampled_tensors(shape["n_layers"]).items():
        tensor = parameters[tensor_name].detach()
        values = (_columns if tensor_name.endswith(REORDERED) else weights_at)(tensor, count)
        if not all(map(math.isfinite, values)):
            raise ValueError(f"base {name!r} has weights that are not finite in {tensor_name}")
        samples.extend(rounded(values))
    return Fingerprint(name, shape, tuple(samples))


def _positions(size: int, count: int) -> list[int]:
    # multiples of the golden ratio spread evenly over any size, in integers on every platform
    ratio = 0x9E3779B97F4A7C15
    return [((i * ratio % 2**64) * size) >> 64 for i in range(1, count + 1)]


def weights_at(tensor: Tensor, count: int) -> list[float]:
    """`count` numbers of a tensor, at positions that its size alone decides."""
    index = torch.tensor(_positions(tensor.numel(), count), device=tensor.device)
    return elements(tensor, index).float().tolist()


def _columns(tensor: Tensor, count: int) -> list[float]:
    index = torch.tensor(_positions(tensor.shape[1], count), device=tensor.device)
    # sorted: sums of the same numbers in another order would round differently
    squares = columns(tensor, index).float().square().sort(0).values
    return squares.mean(0).sqrt().tolist()
