"""Do the tiles of keys that a kernel visits cover what its rows see, and nothing else?"""

from functools import partial
from typing import Any

import pytest
import torch

from adapter_kernels.zero_init_attention.configs import HEAD_DIMS
from tests.adapter_kernels.zero_init_attention.kernel_runs import DEVICE, needs_kernels

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
tiles = pytest.importorskip("adapter_kernels.zero_init_attention.tiles")

pytestmark = [pytest.mark.kernel, needs_kernels]


@triton.jit
def _bands_kernel(  # the four limits of one tile of rows
    out_ptr, first, last, m_start, offset, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    low, full_low, full_high, high = tiles.key_bands(first, last, m_start, offset, CAUSAL, BM, BN)
    tl.store(out_ptr, low)
    tl.store(out_ptr + 1, full_low)
    tl.store(out_ptr + 2, full_high)
    tl.store(out_ptr + 3, high)


@triton.jit
def _rows_kernel(  # a block copied through load_rows and store_rows
    x_ptr, out_ptr, stride, low, high, count, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    rows, offs_d = tl.arange(0, 16), tl.arange(0, BLOCK_D)
    x = tiles.load_rows(x_ptr, stride, rows, low, high, offs_d, WIDTH, MASKED)
    tiles.store_rows(out_ptr, stride, rows, count, offs_d, x, WIDTH)


def bands(*arguments: Any) -> list[int]:
    out = torch.empty(4, dtype=torch.int32, device=DEVICE)
    _bands_kernel[(1,)](out, *arguments)
    return out.tolist()


def _seen(first: int, last: int, offset: int | None, i: int, j: int) -> bool:
    return first <= j < last and (offset is None or j <= i + offset)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [(4, 4), (8, 4), (4, 8)])
def test_bands_cover_what_is_seen(causal: bool, block: tuple[int, int]) -> None:
    """By brute force over bounds, diagonals and places of the tile of rows."""
    bm, bn = block
    checked = 0
    for first, last in ((0, 13), (0, 16), (3, 13), (5, 6), (4, 4), (9, 16)):
        for m_start in (0, bm, 3 * bm):
            for offset in (-9, -1, 0, 2, 5, 30):
                low, full_low, full_high, high = bands(first, last, m_start, offset, causal, bm, bn)
                rows = range(m_start, m_start + bm)
                seen = partial(_seen, first, last, offset if causal else None)
                visited = {
                    j
                    for start, stop in ((low, full_low), (full_low, full_high), (full_high, high))
                    for begin in range(start, stop, bn)
                    for j in range(begin, begin + bn)
                }
                wanted = {j for i in rows for j in range(-8, 40) if seen(i, j)}
                assert wanted <= visited
                whole = range(full_low, full_high)
                assert all(seen(i, j) for i in rows for j in whole), "unmasked, yet not all seen"
                checked += 1
    assert checked == 6 * 3 * 6


@pytest.mark.parametrize("width", [8, 16, 40])
def test_rows_outside_are_neither_read_nor_written(width: int) -> None:
    block = next(d for d in HEAD_DIMS if d >= width)
    x = torch.randn(16, width, device=DEVICE)
    expected = torch.full((16, width), 7.0, device=DEVICE)
    out = expected.clone()
    expected[:9] = 0.0
    expected[3:9] = x[3:9]
    x[:3], x[11:] = float("nan"), float("nan")
    _rows_kernel[(1,)](x, out, width, 3, 11, 9, width, block, True)
    assert torch.equal(out, expected)
    x = torch.randn(16, width, device=DEVICE)
    _rows_kernel[(1,)](x, out, width, 0, 0, 16, width, block, False)
    assert torch.equal(out, x)
