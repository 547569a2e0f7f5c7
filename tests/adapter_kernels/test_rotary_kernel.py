"""The kernel of apply_rotary, its backward and write_cache: every layout, nothing elsewhere."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from adapter_kernels import apply_rotary, launch, write_cache
from adapter_kernels.rotary import apply_rotary_backward_reference, apply_rotary_reference
from adapter_kernels.write_cache import write_cache_reference
from tests.adapter_kernels.tolerances import (
    GRADIENT_FACTOR,
    check_as_accurate_as_eager,
    check_bitwise,
)
from tests.adapter_kernels.zero_init_attention.kernel_runs import (
    DEVICE,
    DTYPES,
    launched,
    needs_kernels,
)

pytest.importorskip("triton")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed + len(shape))
    return torch.randn(shape, generator=g).to(DEVICE, dtype)


def angles(*shape: int) -> tuple[Tensor, Tensor]:
    angle = 3 * draw(*shape, seed=5)
    return angle.cos(), angle.sin()


@pytest.mark.kernel
@needs_kernels
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [2, 8, 24, 80, 128])
@pytest.mark.parametrize("dtype", dict.fromkeys((torch.float32, *DTYPES)))
def test_rotation(dtype: torch.dtype, head_dim: int, interleaved: bool, per_sequence: bool) -> None:
    """q and k from one fused projection, so with strides of their own; heads that fill no tile."""
    fused = draw(3, 5, 7 + 2, head_dim, dtype=dtype)
    q, k = fused.split([7, 2], 2)
    cos, sin = angles(*((3, 5) if per_sequence else (5,)), head_dim // 2)
    before = Counter(launch.counts)
    got = apply_rotary(q, k, cos, sin, interleaved=interleaved)
    assert launched(before) == {"rotary_kernel": 1}
    eager = apply_rotary_reference(q, k, cos, sin, interleaved)
    wide = (x.double() for x in (q, k, cos, sin))
    for name, one, plain, truth in zip(
        "qk", got, eager, apply_rotary_reference(*wide, interleaved), strict=True
    ):
        check_as_accurate_as_eager(name, one, plain, truth)


@pytest.mark.kernel
@needs_kernels
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [2, 24, 128])
@pytest.mark.parametrize("dtype", dict.fromkeys((torch.float32, *DTYPES)))
def test_gradients(
    dtype: torch.dtype,
    head_dim: int,
    interleaved: bool,
    per_sequence: bool,
    needs: tuple[bool, bool],
) -> None:
    """Both or one of them, from one product (B, heads, T, D), as attention gives them."""
    fused = draw(3, 7 + 2, 5, head_dim, dtype=dtype).transpose(1, 2)
    given = [x if need else None for x, need in zip(fused.split([7, 2], 2), needs, strict=True)]
    cos, sin = angles(*((3, 5) if per_sequence else (5,)), head_dim // 2)
    before = Counter(launch.counts)
    got = torch.ops.adapter_kernels.apply_rotary_backward(*given, cos, sin, interleaved)
    assert launched(before) == {"rotary_kernel": 1}
    eager = apply_rotary_backward_reference(*given, cos, sin, interleaved)
    wide = [None if x is None else x.double() for x in given]
    truth = apply_rotary_backward_reference(*wide, cos.double(), sin.double(), interleaved)
    for name, one, plain, exact in zip(("dq", "dk"), got, eager, truth, strict=True):
        assert (one.shape, one.dtype) == (plain.shape, plain.dtype)
        assert one.is_contiguous()
        check_as_accurate_as_eager(name, one, plain, exact, GRADIENT_FACTOR)


@pytest.mark.kernel
@needs_kernels
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_pass_through_the_kernel(interleaved: bool) -> None:
    """They turn back what was turned; torch.compile takes it whole; a sum's has no strides."""
    cos, sin = angles(3, 5, 4)
    q, k = (draw(3, 5, n, 8, seed=n).requires_grad_() for n in (6, 2))

    def step(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary(q, k, cos, sin, interleaved=interleaved)

    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        before = Counter(launch.counts)
        outs = function(q, k)
        back = torch.autograd.grad(outs, (q, k), [out.detach() for out in outs])
        assert launched(before) == {"rotary_kernel": 2}
        for one, other in zip(back, (q, k), strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-5)
        (dk,) = torch.autograd.grad(function(q, k)[1].sum(), (k,))
        ones = apply_rotary_backward_reference(None, torch.ones_like(k), cos, sin, interleaved)
        torch.testing.assert_close(dk, ones[1], rtol=1e-5, atol=1e-5)
    for given in ((q, k), (q, None), (None, k), (None, None)):
        leaves = [None if x is None else x.detach() for x in given]
        op = torch.ops.adapter_kernels.apply_rotary_backward.default
        torch.library.opcheck(op, (*leaves, cos, sin, interleaved))


@pytest.mark.kernel
@needs_kernels
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_slots_of_new_tokens_change(dtype: torch.dtype, turned: bool, paged: bool) -> None:
    """Two tokens of three sequences, one of them without a slot, into a cache full of NaN."""
    k, v = (draw(3, 2, 2, 24, seed=s, dtype=dtype) for s in (1, 2))
    positions = torch.tensor([[0, 5], [11, -1], [3, 4]], device=DEVICE)
    cos, sin = angles(3, 2, 12) if turned else (None, None)
    shape, table = (3, 12, 2, 24), None
    if paged:
        order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
        table = order.int().view(3, 3).to(DEVICE)
        shape = (9, 4, 2, 24)
    q = draw(3, 2, 5, 24, seed=3, dtype=dtype) if turned else None
    found, rotated = [], []
    for function in (write_cache, write_cache_reference):
        caches = [torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for _ in "kv"]
        arguments = {"positions": positions, "page_table": table, "cos": cos, "sin": sin, "q": q}
        if function is write_cache:
            before = Counter(launch.counts)
            rotated.append(write_cache(k, v, *caches, **arguments))
            assert launched(before) == {"rotary_kernel": 1}
        else:
            rotated.append(write_cache_reference(k, v, *caches, *arguments.values()))
        found.append(caches)
    if q is not None:
        check_as_accurate_as_eager("q", *rotated, rotated[1].double())
    for name, got, expected in zip("kv", *found, strict=True):
        written = expected.isfinite()
        assert int(written.sum()) == 5 * 2 * 24
        check_bitwise(f"{name} elsewhere", got.isfinite(), written)
        check_as_accurate_as_eager(
            name, got[written], expected[written], expected[written].double()
        )


@pytest.mark.kernel
@needs_kernels
def test_pages_that_are_not_there_are_skipped() -> None:
    """What a GPU does, where nobody looks: below the checks, a page or a slot out of range."""
    from adapter_kernels import rotary_kernel

    k, v = (draw(2, 1, 2, 8, seed=s) for s in (1, 2))
    caches = [torch.full((3, 4, 2, 8), float("nan"), device=DEVICE) for _ in "kv"]
    table = torch.tensor([[99, 1], [2, -7]], dtype=torch.int32, device=DEVICE)
    for positions in ([[0], [8]], [[-5], [4]]):
        slots = torch.tensor(positions, device=DEVICE)
        rotary_kernel.write_cache(k, v, *caches, slots, table, None, None, None)
    assert not any(bool(x.isfinite().any()) for x in caches)


@pytest.mark.kernel
@needs_kernels
def test_empty_inputs() -> None:
    cos, sin = angles(5, 4)
    q, k = apply_rotary(draw(0, 5, 3, 8), draw(0, 5, 1, 8), cos, sin, interleaved=True)
    assert (q.shape, k.shape) == ((0, 5, 3, 8), (0, 5, 1, 8))


@pytest.mark.kernel
@needs_kernels
def test_heads_of_an_odd_width_are_written_whole() -> None:
    """The kernel moves pairs, and left the last number of such heads out."""
    for width in (1, 5):
        k, v = draw(1, 2, 3, width, seed=1), draw(1, 2, 3, width, seed=2)
        caches = [torch.full((1, 4, 3, width), float("nan"), device=DEVICE) for _ in "kv"]
        write_cache(k, v, *caches, positions=torch.tensor([[3, 0]], device=DEVICE))
        for held, new in zip(caches, (k, v), strict=True):
            check_bitwise("written", held[:, [3, 0]], new)
            assert not held[:, 1:3].isfinite().any()
