"""Every tolerance of the kernel tests, with its reason. Nothing else in the tests states one.

An implementation is measured against the truth, the reference in float64, and may be at most a
factor worse than the plain formula in its own dtype ("eager"), plus a floor of a few roundings.
"""

import torch
from torch import Tensor

# rounding happens at other places than in eager: twice its error, and thrice for gradients, which
# pass through the scores twice
OUT_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
# eager may be exact by luck, so a few units in the last place of the largest result are free
FLOOR_ROUNDINGS = 4.0
# float32 throughout: products of 8 to 256 terms, about sqrt(256) roundings of 6e-8 each
FLOAT32_RELATIVE = 1e-5
# lse scales a row of P, which is rounded to half precision: this share of that rounding is free
LSE_SHARE = 1 / 32
# float64 against float64, the same equation summed in another order
FLOAT64_RELATIVE = 1e-11
# two results that are equal in exact arithmetic, each rounded to its own dtype a few times
IDENTITY_ROUNDINGS = 16.0


def largest(x: Tensor) -> float:
    """max |x|, 0 for an empty tensor."""
    return float(x.detach().abs().max()) if x.numel() else 0.0


def check_finite(name: str, x: Tensor) -> None:
    """Assert that nothing is NaN or infinite."""
    assert bool(torch.isfinite(x).all()), f"{name} is not finite"


def check_as_accurate_as_eager(
    name: str,
    ours: Tensor,
    eager: Tensor,
    truth: Tensor,
    factor: float = OUT_FACTOR,
    floor: float | None = None,
) -> None:
    """Assert error <= factor x eager's error + floor; prints all three.

    The floor defaults to FLOOR_ROUNDINGS x eps x max |truth|, eps that of eager's dtype.
    """
    check_finite(name, ours)
    eps = torch.finfo(eager.dtype).eps
    floor = FLOOR_ROUNDINGS * eps * largest(truth) if floor is None else floor
    error, baseline = largest(ours.double() - truth), largest(eager.double() - truth)
    print(f"{name}: error {error:.3g}, eager {baseline:.3g}, floor {floor:.3g}")
    assert error <= factor * baseline + floor, f"{name}: {error} against eager's {baseline}"
    if eager.dtype == torch.float32:
        bound = FLOAT32_RELATIVE * largest(truth) + floor
        assert error <= bound, f"{name}: {error} exceeds {bound} in float32"


def check_lse(ours: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Assert that an lse is right: as the formula's in float32, or lost in P's rounding below."""
    floor = None
    if dtype != torch.float32:
        floor = LSE_SHARE * torch.finfo(dtype).eps
        # not the rule of float32 on top
        eager = eager.double()
    check_as_accurate_as_eager("lse", ours, eager, truth, floor=floor)


def check_float64(name: str, got: Tensor, expected: Tensor) -> None:
    """Assert that two float64 results of one equation agree."""
    assert got.dtype == expected.dtype == torch.float64
    assert got.shape == expected.shape, f"{name}: {tuple(got.shape)}, {tuple(expected.shape)}"
    check_finite(name, got)
    error, bound = largest(got - expected), FLOAT64_RELATIVE * max(1.0, largest(expected))
    assert error <= bound, f"{name}: differs by {error}, more than {bound}"


def check_identity(name: str, got: Tensor, expected: Tensor, scale: float | None = None) -> None:
    """Assert that two roundings of one exact value agree; `scale` is the largest term summed."""
    assert got.shape == expected.shape, f"{name}: {tuple(got.shape)}, {tuple(expected.shape)}"
    check_finite(name, got)
    scale = largest(expected) if scale is None else scale
    error = largest(got.double() - expected.double())
    bound = IDENTITY_ROUNDINGS * torch.finfo(got.dtype).eps * scale
    assert error <= bound, f"{name}: differs by {error}, more than {bound}"


def check_bitwise(name: str, got: Tensor, expected: Tensor) -> None:
    """Assert equality of every value, and of dtype and shape."""
    assert got.dtype == expected.dtype, f"{name}: {got.dtype}, {expected.dtype}"
    assert got.shape == expected.shape, f"{name}: {tuple(got.shape)}, {tuple(expected.shape)}"
    assert torch.equal(got, expected), (
        f"{name}: differs by {largest(got.double() - expected.double())}"
    )
