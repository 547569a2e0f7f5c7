"""Is there a tile for every kernel everywhere, and does none of them depend on the prompt?"""

import pytest
import torch

from adapter_kernels.zero_init_attention import configs
from adapter_kernels.zero_init_attention.configs import tile

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("capability", configs.CAPABILITIES)
@pytest.mark.parametrize("direction", configs.DIRECTIONS)
def test_every_head_width_and_dtype_has_a_row(capability: int, direction: str) -> None:
    for dtype in DTYPES:
        for head_dim in range(8, 257, 8):
            row = tile(capability, direction, head_dim, dtype)
            for size in (row.block_m, row.block_n):
                assert size >= 16
                assert size & (size - 1) == 0, "tiles are powers of two"
            assert row.num_warps in (4, 8)
            assert row.speed, "a row says its measurement, or that there is none"


@pytest.mark.parametrize(
    ("head_dim", "padded"),
    [(8, 16), (16, 16), (24, 32), (40, 64), (80, 128), (96, 128), (256, 256)],
)
def test_heads_are_padded_to_powers_of_two(head_dim: int, padded: int) -> None:
    assert configs.padded_head_dim(head_dim) == padded
    assert tile(90, "forward", head_dim, torch.float16) == tile(
        90, "forward", padded, torch.float16
    )


@pytest.mark.parametrize(
    ("rows", "head_dim", "dtype", "expected"),
    [
        (1, 64, torch.float16, 16),
        (16, 64, torch.float16, 16),
        (17, 64, torch.float16, 32),
        (64, 128, torch.bfloat16, 64),
        (65, 128, torch.bfloat16, 16),
        (300, 40, torch.float16, 16),
        (17, 64, torch.float32, 16),
        (17, 256, torch.float16, 16),
    ],
)
def test_prompt_tiles(rows: int, head_dim: int, dtype: torch.dtype, expected: int) -> None:
    assert configs.prompt_tile(rows, head_dim, dtype) == expected
