"""Tensors of another program's file, taken by name: whatever remains in the end is an error.

A `Source` hands them out in float32 and remembers the widths that their shapes tell.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_adapter.checkpoints.torch_file import check_checksums, read_torch_file
from llama_adapter.tuning import NORMS, tuned_group

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# input and output width of every linear map, in the names that a Source remembers them by
WIDTHS = {
    "wq": ("dim", "query_width"),
    "wk": ("dim", "key_width"),
    "wv": ("dim", "key_width"),
    "wo": ("query_width", "dim"),
    "w1": ("dim", "hidden_dim"),
    "w2": ("hidden_dim", "dim"),
    "w3": ("dim", "hidden_dim"),
    "output": ("dim", "vocab_size"),
}


class Source:
    """The tensors of a file, taken one by one.

    Attributes:
        path: for messages.
        extra: what else the file holds beside its tensors.
        sizes: widths by name, as the tensors or the base told them.
    """

    def __init__(
        self, path: Path, tensors: Mapping[Any, Any], extra: dict[str, Any] | None = None
    ) -> None:
        """Check that every entry is a dense tensor with all its data in the file.

        Raises:
            ValueError: one is not.
        """
        self.path, self.extra, self.sizes = path, extra or {}, dict[str, int]()
        self._left: dict[str, Tensor] = {}
        for name, value in tensors.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                kind = type(value).__name__
                raise ValueError(f"{path}: {str(name)[:200]} must be a tensor, got {kind}")
            dense = value.layout == torch.strided and value.device.type == "cpu"
            if not dense or value.is_quantized or value.is_nested:
                raise ValueError(f"{path}: {name} must be a plain dense tensor")
            held = value.untyped_storage().nbytes()
            if value.numel() * value.element_size() > held:
                raise ValueError(
                    f"{path}: {name} must have data for its shape {tuple(value.shape)}, got "
                    f"{held} bytes"
                )
            self._left[name] = value

    @property
    def names(self) -> list[str]:
        """Names of the tensors that are left."""
        return list(self._left)

    def has(self, name: str) -> bool:
        """Whether a tensor of this name is left."""
        return name in self._left

    def peek(self, name: str) -> Tensor:
        """A tensor as it is, which stays."""
        return self._left[name]

    def rename(self, renamed: Mapping[str, str]) -> None:
        """Call every tensor that is left by another name; new names to old."""
        self._left = {new: self._left[old] for new, old in renamed.items()}

    def take(self, name: str, *shape: str | int) -> Tensor:
        """Take a tensor in float32.

        Args:
            name: of the tensor.
            shape: each size as a number, or as a name whose number the first taker tells.

        Raises:
            ValueError: it is missing, of another shape or dtype, or not finite.
        """
        if name not in self._left:
            raise ValueError(f"{self.path} lacks tensor {name}")
        tensor = self._left.pop(name)
        expected = [size if isinstance(size, int) else self.sizes.get(size) for size in shape]
        fits = len(expected) == tensor.ndim and all(
            size in (None, got) for size, got in zip(expected, tensor.shape, strict=True)
        )
        if not fits or tensor.numel() == 0:
            wanted = ", ".join(
                str(size if number is None else number)
                for size, number in zip(shape, expected, strict=True)
            )
            raise ValueError(
                f"{self.path}: {name} must have shape ({wanted}), got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{self.path}: {name} must be float32, float16 or bfloat16, got {tensor.dtype}"
            )
        for size, got in zip(shape, tensor.shape, strict=True):
            if isinstance(size, str):
                self.sizes[size] = got
        if not tensor.isfinite().all():
            raise ValueError(f"{self.path}: {name} must be finite, got NaN or infinity")
        return tensor.detach().float().contiguous().clone()

    def take_gate(self, name: str, *heads_at: int) -> Tensor:
        """A gate per head as (H,), from four sizes, all 1 but the heads'; a single one as (1,).

        Args:
            name: of the tensor.
            heads_at: where H may be, the usual place first.

        Raises:
            ValueError: as `take`.
        """
        held = self._left.get(name)
        shape = () if held is None else tuple(held.shape)
        if shape == (1,):
            return self.take(name, 1)
        wide = [at for at in heads_at if len(shape) == 4 and shape[at] > 1]
        places: list[str | int] = [1] * 4
        places[(wide or heads_at)[0]] = "n_heads"
        return self.take(name, *places).view(-1)

    def drop(self, pattern: str) -> list[str]:
        """Names of the tensors that match, which are left aside."""
        found = [name for name in self._left if re.fullmatch(pattern, name)]
        for name in found:
            del self._left[name]
        return found

    def layer_numbers(self, pattern: str) -> list[int]:
        """The numbers that names matching a pattern with one group hold, ascending."""
        found = (re.fullmatch(pattern, name) for name in self._left)
        return sorted({int(match[1]) for match in found if match and len(match[1]) < 6})

    def tuned(self, table: Mapping[str, str], n_layers: int, scale_side: str) -> dict[str, Tensor]:
        """The groups of biases, scales and norms that the file holds, their layers stacked.

        Args:
            table: our name to theirs, with {} for the layer.
            n_layers: of the base.
            scale_side: which width of its linear map a scale has.

        Raises:
            ValueError: a group is there in part, or as `take`.
        """
        found: dict[str, Tensor] = {}
        for group in ("norm", "bias", "scale"):
            names = [name for name in table if tuned_group(name) == group]
            rows = {name: range(n_layers) if "{}" in table[name] else [None] for name in names}
            if not any(self.has(table[name].format(row)) for name in names for row in rows[name]):
                continue
            for name in names:
                taken = [
                    self.take(table[name].format(row), width_of(name, scale_side))
                    for row in rows[name]
                ]
                found[name] = torch.stack(taken) if "{}" in table[name] else taken[0]
        return found

    def lora(self, table: Mapping[str, tuple[str, str]], n_layers: int) -> dict[str, Tensor]:
        """The LoRA tensors that the file holds, by our names, their layers stacked.

        Args:
            table: linear map to their names of A (rank, in) and B (out, rank), with {} for the
                layer.
            n_layers: of the base.

        Raises:
            ValueError: a map has them in part, or as `take`.
        """
        found: dict[str, Tensor] = {}
        for linear, pair in table.items():
            places = [[place.format(row) for row in range(n_layers)] for place in pair]
            if not any(self.has(name) for names in places for name in names):
                continue
            n_in, n_out = WIDTHS[linear]
            for kind, names, shape in zip(
                "ab", places, (("lora_rank", n_in), (n_out, "lora_rank")), strict=True
            ):
                found[f"lora_{kind}_{linear}"] = torch.stack([self.take(n, *shape) for n in names])
        return found

    def finish(self) -> None:
        """Raise ValueError if a tensor is left."""
        if self._left:
            more = f" and {len(self._left) - 3} more" if len(self._left) > 3 else ""
            raise ValueError(
                f"{self.path} has surplus tensors: {', '.join(sorted(self._left)[:3])}{more}"
            )


def width_of(name: str, scale_side: str) -> str:
    """The name of a tuned tensor's width."""
    if name in NORMS:
        return "dim"
    group, _, linear = name.partition("_")
    return WIDTHS[linear][0 if group == "scale" and scale_side == "input" else 1]


def open_source(path: Path) -> Source:
    """A torch file of tensors, bare or under "model".

    Raises:
        ValueError: it is damaged or holds something else.
    """
    content = read_torch_file(path)
    check_checksums(path)
    inner = content.get("model")
    if not isinstance(inner, dict):
        return Source(path, content)
    return Source(path, inner, {str(k): v for k, v in content.items() if k != "model"})
