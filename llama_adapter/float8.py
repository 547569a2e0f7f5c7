"""A frozen weight in 8-bit floating point, and products of 8-bit floats with it.

The weight is rounded once, and what it is multiplied by for every product: both to e4m3 (4 bits of
exponent, 3 of mantissa) with one scale per row. torch.nn.functional.linear takes such a weight,
and the gradient of its input is another such product.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

FLOAT8 = torch.float8_e4m3fn
# what torch multiplies in whole
MULTIPLE = 16
_LARGEST = torch.finfo(FLOAT8).max
# a row of zeros has a scale nevertheless
_SMALLEST = 1e-30


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round (M, K) to e4m3 numbers (M, K) and scales (M, 1) in float32, x = scale * number.

    A row's scale takes its largest magnitude to e4m3's, 448. NaN and infinity give NaN.
    """
    infinity = float("inf")
    largest = torch.linalg.vector_norm(x, infinity, -1, keepdim=True, dtype=torch.float32)
    scale = largest.clamp_min(_SMALLEST) / _LARGEST
    return (x / scale).to(FLOAT8), scale


class Float8Weight(Tensor):
    """A weight w (N, C), w[n, c] = scale[n] * numbers[n, c], that takes no gradient.

    One byte a weight; two from the first gradient on that passes through it, whose product needs
    the numbers of a column side by side.

    Attributes:
        numbers: (N, C) e4m3.
        scale: (N,) float32.
    """

    numbers: Tensor
    scale: Tensor

    def __new__(cls, numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> "Float8Weight":
        """Say to be of `dtype`, that of its products."""
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, numbers.shape, dtype=dtype, device=numbers.device
        )
        made.numbers, made.scale, made._columns = numbers, scale, None
        return made

    @classmethod
    def of(cls, weight: Tensor) -> "Float8Weight":
        """Round a weight (N, C), whose N and C must be multiples of MULTIPLE."""
        numbers, scale = round_rows(weight.detach())
        return cls(numbers, scale[:, 0], weight.dtype)

    @property
    def columns(self) -> Tensor:
        """(C, N) e4m3: the numbers, a column after the other; made once."""
        if self._columns is None:
            self._columns = self.numbers.view(torch.uint8).t().contiguous().view(FLOAT8)
        return self._columns

    def dequantize(self) -> Tensor:
        """The rounded weight (N, C)."""
        return (self.numbers.float() * self.scale[:, None]).to(self.dtype)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """A linear map without bias is ours; what else there is, torch finds no operation for."""
        if func is functional.linear and len(args) == 2 and isinstance(args[1], cls):
            return _Product.apply(*args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What a parameter needs."""
        if func is torch.ops.aten.detach.default:
            (weight,) = args
            return cls(weight.numbers, weight.scale, weight.dtype)
        raise NotImplementedError(f"{func} of a weight in float8: only linear maps take it")


class _Product(torch.autograd.Function):
    """out = x w^T, and of its gradient that of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Float8Weight) -> Tensor:
        ctx.weight = weight
        # sums in a little less than float32, at twice the speed on Hopper
        return _multiply(x, weight.numbers, weight.scale, fast=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (dout,), weight = gradients, ctx.weight
        # dx[m, c] = sum over n of (dout[m, n] scale[n]) numbers[n, c]: w's scales go along the sum,
        # where a product takes none, so that they are multiplied in before dout is rounded
        one = torch.ones_like(weight.scale[:1]).expand(weight.shape[1]).contiguous()
        dx = _multiply(dout.float() * weight.scale, weight.columns, one, fast=False, like=dout)
        return dx, None


def _multiply(
    x: Tensor, numbers: Tensor, scale: Tensor, *, fast: bool, like: Tensor | None = None
) -> Tensor:
    """Products (..., N) of rows (..., K), rounded, and of numbers (N, K) with scales (N,)."""
    dtype, shape = (x if like is None else like).dtype, (*x.shape[:-1], len(numbers))
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not len(rows):
        return x.new_zeros(shape, dtype=dtype)
    rounded, own = round_rows(rows)
    by_row = functional.ScalingType.RowWise
    out = functional.scaled_mm(
        rounded,
        numbers.t(),
        own,
        by_row,
        scale[None],
        by_row,
        output_dtype=dtype,
        use_fast_accum=fast,
    )
    return out.view(shape)
