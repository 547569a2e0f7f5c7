"""Argument checks shared by every public function.

Each check raises ValueError naming the argument, what was expected and what was got. They look at
shapes, dtypes and devices only, so they never wait for a GPU; `check_values` and `check_range` look
at contents, and therefore at those of CPU tensors alone.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
FEW = 256
MOST_FORMS = 4096
Sizes = tuple[int | None, ...]


_passed: set[tuple[Any, ...]] = set()


def passed_before(function: str, *arguments: object) -> Callable[[], None] | None:
    """None where arguments of this very form passed `function` before, else what remembers them.

    A form is what checks of shapes, strides, dtypes and devices look at: small calls, as decoding
    makes them by the thousand, would spend a third of their time on the same answers. Contents are
    no part of it. A form that cannot be compared, as one that is traced, is checked every time.
    """
    if torch.compiler.is_compiling():
        return _nothing
    try:
        form = (function, *[_form(x) for x in arguments])
        if form in _passed:
            return None
    except (TypeError, RuntimeError):
        return _nothing

    def remember() -> None:
        if len(_passed) >= MOST_FORMS:
            _passed.clear()
        _passed.add(form)

    return remember


def _nothing() -> None:
    """Remember nothing."""


def _form(x: object) -> object:
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.device
    return x, type(x)


def dtype_name(dtype: torch.dtype) -> str:
    """`float16` of torch.float16."""
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, value: object) -> None:
    """Raise unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")


def _fits(tensor: Tensor, sizes: Sizes) -> bool:
    shape = tensor.shape
    if shape == sizes:
        return True
    if len(shape) != len(sizes):
        return False
    for have, want in zip(shape, sizes, strict=True):
        if want is not None and want != have:
            return False
    return True


def _wanted(letters: str, sizes: Sizes) -> str:
    """`(P, G, D) = (P, 2, 64)`: a size where it is known, else its letter."""
    if not any(want is not None for want in sizes):
        return letters
    names = letters.strip("()").split(", ")
    if len(names) != len(sizes):
        names = ["any"] * len(sizes)
    known = [str(n if want is None else want) for n, want in zip(names, sizes, strict=True)]
    return f"{letters} = ({', '.join(known)}{',' if len(known) == 1 else ''})"


def check_shape(
    name: str, tensor: Tensor, letters: str, sizes: Sizes, *others: tuple[str, Sizes]
) -> None:
    """Raise unless `tensor` has these sizes, or those of one of `others`; None accepts any size."""
    check_tensor(name, tensor)
    if _fits(tensor, sizes) or any(_fits(tensor, other) for _, other in others):
        return
    wanted = " or ".join(_wanted(*form) for form in ((letters, sizes), *others))
    raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise unless the dtype of `tensor` is one of `allowed`."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in allowed:
        check_tensor(name, tensor)
        wanted = " or ".join(dtype_name(dtype) for dtype in allowed)
        raise ValueError(f"{name} must be {wanted}, got {dtype_name(tensor.dtype)}")


def check_device(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless both tensors are on one device."""
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {like_name}, {like.device}, got {tensor.device}"
        )


def check_last_contiguous(name: str, tensor: Tensor) -> None:
    """Raise unless the last dimension of `tensor` has stride 1 (outer strides are free)."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel() > 0:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}"
        )


def check_flag(name: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_number(name: str, value: object, low: float = -math.inf) -> None:
    """Raise unless `value` is a finite number of at least `low`."""
    expected = "a finite number" + ("" if low == -math.inf else f" of at least {low:g}")
    try:
        good = isinstance(value, (int, float)) and math.isfinite(value) and value >= low
    except OverflowError:
        good = False
    if not good or isinstance(value, bool):
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Raise unless `value` is an integer from low to high; one that is traced is not looked at."""
    if isinstance(value, torch.SymInt):
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}")


def contents_checked(tensor: Tensor) -> bool:
    """Whether the values of `tensor` can be looked at: they lie on the CPU and are not traced."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


def check_values(
    name: str, tensor: Tensor, expected: str, accept: Callable[[Tensor], Tensor]
) -> None:
    """Raise unless `accept(tensor)` holds everywhere; skipped on devices other than the CPU."""
    if not contents_checked(tensor) or tensor.numel() == 0:
        return
    good = accept(tensor)
    if not bool(good.all()):
        bad = tensor[~good].flatten()[0].item()
        raise ValueError(f"{name} must be {expected}, got {bad}")


def check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    """Raise unless low <= tensor <= high everywhere; skipped on devices other than the CPU."""
    if not contents_checked(tensor) or tensor.numel() == 0:
        return
    # a list of a few numbers costs less than a reduction
    few = tensor.numel() <= FEW
    values = tensor.reshape(-1).tolist() if few else [x.item() for x in tensor.aminmax()]
    if low <= min(values) <= max(values) <= high:
        return
    for value in (min(values), max(values)):
        if not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {value}")
