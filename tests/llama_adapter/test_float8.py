"""Products of 8-bit floats are those of the rounded numbers, and so are their gradients."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_adapter.float8 import Float8Weight, round_rows


def random(*shape: int, seed: int) -> Tensor:
    """Rows of sizes that differ by a hundred."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (2 * torch.rand(*shape[:-1], 1, generator=generator) - 1)
    return torch.randn(shape, generator=generator) * sizes


def held(weight: Tensor) -> Float8Weight:
    parameter = nn.Parameter(Float8Weight.of(weight), requires_grad=False)
    assert isinstance(parameter, Float8Weight)
    return parameter


def rounded(x: Tensor) -> Tensor:
    numbers, scale = round_rows(x)
    return numbers.double() * scale


def test_rounding_is_to_three_bits_of_mantissa_below_a_rows_largest() -> None:
    x = random(31, 65, seed=1)
    numbers, scale = round_rows(x)
    assert numbers.dtype == torch.float8_e4m3fn
    assert scale.shape == (31, 1)
    # half a step: 1/16 of a number, or half of the smallest, 2^-9, which is of 448 at the top
    allowed = (x.abs() / 16).maximum(scale * 2.0**-10)
    assert bool(((rounded(x) - x).abs() <= 1.001 * allowed).all())
    largest = x.abs().amax(dim=1)
    assert torch.allclose(rounded(x).abs().amax(dim=1).float(), largest, rtol=1e-6)
    back = rounded(x)
    assert 0.015 < float((back - x).norm() / x.norm()) < 0.04


def test_rows_of_zeros_stay_and_what_is_not_finite_shows() -> None:
    x = random(4, 32, seed=2)
    x[0], x[1, 3], x[2, 5] = 0, torch.nan, torch.inf
    back = rounded(x)
    assert bool((back[0] == 0).all())
    assert bool(back[1:3].isnan().any(dim=1).all())
    assert bool(back[3].isfinite().all())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2.0**-8)])
@pytest.mark.parametrize("shape", [(1, 48), (2, 7, 48), (3, 0, 48)])
def test_product_and_gradient_are_those_of_the_rounded_numbers(
    shape: tuple[int, ...], dtype: torch.dtype, limit: float
) -> None:
    weight = held(random(80, 48, seed=3).to(dtype))
    assert (weight.dtype, weight.shape, weight.requires_grad) == (dtype, (80, 48), False)
    x = random(*shape, seed=4).to(dtype).requires_grad_(True)
    out = F.linear(x, weight)
    assert (out.dtype, out.shape) == (dtype, (*shape[:-1], 80))
    w = weight.numbers.double() * weight.scale[:, None]
    assert torch.equal(weight.dequantize(), w.to(dtype))
    dout = random(*out.shape, seed=5).to(dtype)
    (dx,) = torch.autograd.grad(out, x, dout)
    assert (dx.dtype, dx.shape) == (dtype, shape)
    scaled = rounded((dout.float() * weight.scale).view(-1, 80)).view(dout.shape)
    pairs = (
        (out, rounded(x.detach()) @ w.t(), x.detach().double() @ w.t()),
        (dx, scaled @ weight.numbers.double(), dout.double() @ w),
    )
    for got, wanted, unrounded in pairs:
        largest = wanted.abs().amax(dim=-1, keepdim=True)
        assert bool(((got - wanted).abs() <= limit * largest).all())
        if got.numel():
            error = (got.detach() - unrounded).norm() / unrounded.norm()
            assert 1e-3 < float(error) < 0.05


def test_rows_that_lie_apart_are_taken() -> None:
    weight, x = held(random(32, 48, seed=6)), random(48, 5, seed=7)
    assert torch.equal(F.linear(x.t(), weight), F.linear(x.t().contiguous(), weight))


def test_a_byte_a_weight_and_another_from_the_first_gradient_on() -> None:
    weight, x = held(random(32, 48, seed=6)), random(5, 48, seed=7)
    F.linear(x, weight)
    assert weight.numbers.untyped_storage().nbytes() == 32 * 48
    assert weight._columns is None
    F.linear(x.requires_grad_(True), weight).sum().backward()
    columns = weight.columns
    assert torch.equal(columns.float(), weight.numbers.float().t())
    assert columns.untyped_storage().nbytes() == 32 * 48
    F.linear(x, weight).sum().backward()
    assert weight.columns is columns


def test_nothing_but_a_linear_map_takes_it() -> None:
    weight = held(random(32, 48, seed=6))
    with pytest.raises(
        NotImplementedError, match="of a weight in float8: only linear maps take it"
    ):
        weight + 1
    with pytest.raises(NotImplementedError, match="only linear maps"):
        F.linear(torch.ones(2, 48), weight, torch.ones(32))


@pytest.mark.gpu
def test_a_gpu_has_the_same_products() -> None:
    """Sums on its tensor cores are a little short of float32."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU of sm_89 or newer")
    weight, x = held(random(176, 256, seed=3).bfloat16()), random(37, 256, seed=4).bfloat16()
    dout = random(37, 176, seed=5).bfloat16()
    leaf = x.cuda().requires_grad_(True)
    out = F.linear(leaf, held(random(176, 256, seed=3).bfloat16().cuda()))
    (dx,) = torch.autograd.grad(out, leaf, dout.cuda())
    # the numbers themselves: not every torch multiplies 8-bit floats on a processor
    numbers = weight.numbers.double()
    truth = rounded(x) @ (numbers * weight.scale[:, None]).t()
    truth_dx = rounded(dout.float() * weight.scale) @ numbers
    for got, exact in ((out.detach(), truth), (dx, truth_dx)):
        largest = exact.abs().amax(dim=-1, keepdim=True)
        assert bool(((got.cpu().double() - exact).abs() <= 0.01 * largest).all())
