"""Tiles of every kernel, one row per architecture, direction, width of the dtype and head width.

A row is chosen by these alone: never by the prompt, the gate or the length, so that none of them
changes a result's bits. Every row is compiled ahead of time in the tests, which hold it to the
chip's shared memory and, unless it was measured, to registers without spills inside loops; what a
row says of its speed was measured on its GPU at 4 sequences of 2,048 tokens and 32 heads, or it
says "unmeasured".
"""

from dataclasses import dataclass

import torch

UNMEASURED = "unmeasured"
DIRECTIONS = (
    "forward", "backward_dq", "backward_dkv", "backward_dkv_grouped", "prompt_forward",
    "prompt_backward", "decode",
)  # fmt: skip
HEAD_DIMS = (16, 32, 64, 128, 256)
# prompt rows in one tile: more registers than this and the accumulators spill
WIDEST_PROMPT = 64
NARROW_PROMPT = 16


@dataclass(frozen=True)
class TileConfig:
    """How a kernel is cut into programs.

    Attributes:
        block_m: query rows of a tile.
        block_n: keys of a tile.
        num_warps, num_stages: warps per program, and depth of its load pipeline.
        reload_q: read q again for the prompt instead of keeping it in registers beside the
            accumulator.
        speed: the measurement that chose the row, or UNMEASURED.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    reload_q: bool = False
    speed: str = UNMEASURED


def padded_head_dim(head_dim: int) -> int:
    """The width a head has in a tile: the next power of two, 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def prompt_tile(rows: int, head_dim: int, dtype: torch.dtype) -> int:
    """Prompt rows of a tile: all of them where a tile can hold them, else few at a time."""
    widest = WIDEST_PROMPT if dtype != torch.float32 and head_dim <= 128 else NARROW_PROMPT
    if rows > widest:
        return NARROW_PROMPT
    return max(16, 1 << (rows - 1).bit_length())


Rows = dict[str, dict[int, TileConfig]]


def _rows(
    forward: list[TileConfig],
    dq: list[TileConfig],
    dkv: list[TileConfig],
    grouped: list[TileConfig],
) -> Rows:
    """Rows by direction and head width, in the order of HEAD_DIMS.

    `grouped` is dkv where several query heads share a key head: their loop wants registers.
    """
    found = (forward, dq, dkv, grouped, _PROMPT_FORWARD, _PROMPT_BACKWARD, _DECODE)
    return {
        direction: dict(zip(HEAD_DIMS, rows, strict=True))
        for direction, rows in zip(DIRECTIONS, found, strict=True)
    }


# bound by memory on every chip: few registers, many programs
_PROMPT_FORWARD = [
    TileConfig(64, 16, 4, 2),
    TileConfig(64, 16, 4, 2),
    TileConfig(64, 16, 4, 2),
    TileConfig(64, 16, 4, 2),
    TileConfig(64, 16, 8, 1),
]
# two accumulators of the widest prompt, which eight warps hold without spilling at D = 128
_PROMPT_BACKWARD = [
    TileConfig(64, 16, 4, 2),
    TileConfig(64, 16, 4, 2),
    TileConfig(64, 16, 8, 2),
    TileConfig(64, 16, 8, 2),
    TileConfig(32, 16, 8, 2),
]
# bound by memory as well: keys in flight count, not registers. Rows are those of a group's heads
_DECODE = [
    TileConfig(64, 64, 4, 4),
    TileConfig(64, 64, 4, 4),
    TileConfig(64, 64, 4, 3),
    TileConfig(32, 64, 4, 2),
    TileConfig(16, 32, 4, 2),
]
# 64 x 64 with 4 warps spills in dkv, and in forward unless q is read again
_SM80 = _rows(
    forward=[
        TileConfig(128, 64, 4, 3),
        TileConfig(128, 64, 4, 3),
        TileConfig(128, 64, 8, 3),
        TileConfig(128, 64, 8, 3),
        TileConfig(64, 64, 8, 2, reload_q=True),
    ],
    dq=[
        TileConfig(128, 64, 8, 3),
        TileConfig(128, 64, 8, 3),
        TileConfig(128, 64, 8, 3),
        TileConfig(128, 64, 8, 2),
        TileConfig(64, 64, 8, 2),
    ],
    dkv=[
        TileConfig(64, 128, 8, 3),
        TileConfig(64, 128, 8, 3),
        TileConfig(64, 128, 8, 3),
        TileConfig(64, 64, 8, 2),
        TileConfig(32, 64, 8, 1),
    ],
    grouped=[
        TileConfig(64, 128, 8, 3),
        TileConfig(64, 128, 8, 3),
        TileConfig(64, 128, 8, 3),
        TileConfig(32, 64, 8, 2),
        TileConfig(32, 32, 8, 1),
    ],
)
# the instructions of sm_80 with less shared memory: other rows where heads are widest
_SMALL = _rows(
    forward=[*list(_SM80["forward"].values())[:4], TileConfig(64, 32, 8, 2, reload_q=True)],
    dq=[*list(_SM80["backward_dq"].values())[:4], TileConfig(32, 32, 8, 2)],
    dkv=[*list(_SM80["backward_dkv"].values())[:4], TileConfig(32, 32, 8, 2)],
    grouped=list(_SM80["backward_dkv_grouped"].values()),
)
# q stays where wgmma reads it: reading it again costs 58 registers at D = 128
_SM90 = _rows(
    forward=[
        TileConfig(128, 128, 8, 3),
        TileConfig(128, 128, 8, 3),
        TileConfig(64, 64, 4, 3, speed="0.207 ms on H200, 1.32x (128, 128, 8, 3)"),
        # (64, 64, 4, 3) wins by 3 % at 2,048 tokens, and loses 7 to 10 % at 512 and from 8,192 on
        TileConfig(128, 128, 8, 3, speed="0.365 ms on H200, 1.13x (128, 128, 8, 2)"),
        TileConfig(128, 32, 8, 2),
    ],
    dq=[
        TileConfig(128, 64, 8, 3),
        TileConfig(128, 64, 8, 3),
        TileConfig(64, 64, 4, 3, speed="0.231 ms on H200, 1.31x (128, 64, 8, 3)"),
        TileConfig(128, 64, 8, 3, speed="0.460 ms on H100, the fastest of 9"),
        TileConfig(64, 64, 8, 2),
    ],
    dkv=[
        TileConfig(64, 128, 8, 3),
        TileConfig(64, 128, 8, 3),
        TileConfig(64, 64, 4, 3, speed="0.512 ms on H200, 1.12x (64, 128, 8, 3)"),
        TileConfig(32, 64, 4, 2, speed="0.789 ms on H200, 1.19x (32, 128, 8, 2), though it spills"),
        TileConfig(32, 32, 8, 2),
    ],
    grouped=[
        TileConfig(64, 128, 8, 3),
        TileConfig(64, 128, 8, 3),
        TileConfig(32, 128, 8, 3),
        TileConfig(32, 64, 4, 3, speed="0.826 ms on H200, 1.37x (32, 128, 8, 2), though it spills"),
        TileConfig(32, 32, 8, 1),
    ],
)
# accumulators in memory of their own, which leaves registers but wants narrower tiles of keys
_SM100 = _rows(
    forward=[
        TileConfig(128, 128, 8, 3),
        TileConfig(128, 128, 8, 3),
        TileConfig(128, 128, 8, 3),
        TileConfig(128, 64, 8, 3),
        TileConfig(64, 64, 8, 2),
    ],
    dq=list(_SM90["backward_dq"].values()),
    dkv=list(_SM90["backward_dkv"].values()),
    grouped=[
        TileConfig(64, 128, 8, 3),
        TileConfig(32, 128, 8, 3),
        TileConfig(32, 128, 8, 3),
        TileConfig(32, 64, 8, 1),
        TileConfig(32, 32, 8, 1),
    ],
)
_SM120 = _rows(
    forward=[
        TileConfig(128, 64, 4, 3),
        TileConfig(128, 64, 4, 3),
        TileConfig(128, 64, 8, 3),
        TileConfig(128, 32, 8, 2),
        TileConfig(64, 32, 8, 2, reload_q=True),
    ],
    dq=[
        TileConfig(128, 64, 8, 3),
        TileConfig(128, 64, 8, 3),
        TileConfig(128, 64, 8, 3),
        TileConfig(128, 32, 8, 2),
        TileConfig(32, 32, 8, 2),
    ],
    dkv=[
        TileConfig(64, 128, 8, 3),
        TileConfig(64, 128, 8, 3),
        TileConfig(32, 64, 4, 2),
        TileConfig(64, 64, 8, 1),
        TileConfig(32, 32, 8, 2),
    ],
    grouped=[
        TileConfig(64, 128, 8, 3),
        TileConfig(32, 128, 8, 3),
        TileConfig(32, 128, 8, 3),
        TileConfig(32, 64, 8, 2),
        TileConfig(32, 32, 8, 1),
    ],
)
_HALF: dict[int, Rows] = {80: _SM80, 86: _SMALL, 89: _SMALL, 90: _SM90, 100: _SM100, 120: _SM120}
# exact products have no matrix unit: the same small tiles on every architecture; they serve parity,
# and at D = 256 some spill
_FLOAT32: Rows = _rows(
    forward=[
        TileConfig(64, 32, 4, 3),
        TileConfig(64, 32, 4, 3),
        TileConfig(64, 32, 8, 2),
        TileConfig(16, 32, 8, 2, reload_q=True),
        TileConfig(16, 16, 4, 2, reload_q=True),
    ],
    dq=[
        TileConfig(16, 32, 4, 2),
        TileConfig(16, 32, 4, 2),
        TileConfig(64, 32, 8, 2),
        TileConfig(16, 32, 8, 2),
        TileConfig(16, 16, 8, 2),
    ],
    dkv=[
        TileConfig(32, 64, 8, 2),
        TileConfig(32, 32, 8, 2),
        TileConfig(32, 32, 8, 1),
        TileConfig(16, 32, 8, 2),
        TileConfig(16, 16, 8, 1),
    ],
    grouped=[
        TileConfig(32, 64, 8, 2),
        TileConfig(16, 32, 8, 1),
        TileConfig(32, 32, 8, 2),
        TileConfig(16, 16, 8, 1),
        TileConfig(16, 16, 8, 1),
    ],
) | {
    "prompt_forward": {
        16: TileConfig(64, 16, 4, 2),
        32: TileConfig(64, 16, 4, 2),
        64: TileConfig(64, 16, 4, 2),
        128: TileConfig(16, 16, 8, 1),
        256: TileConfig(16, 16, 8, 1),
    },
    "prompt_backward": {
        16: TileConfig(32, 16, 4, 2),
        32: TileConfig(32, 16, 8, 2),
        64: TileConfig(32, 16, 8, 2),
        128: TileConfig(16, 16, 8, 1),
        256: TileConfig(16, 16, 8, 1),
    },
    "decode": {
        16: TileConfig(16, 32, 8, 2),
        32: TileConfig(16, 16, 4, 2),
        64: TileConfig(16, 32, 8, 2),
        128: TileConfig(16, 32, 8, 2),
        256: TileConfig(16, 16, 8, 2),
    },
}
CAPABILITIES = tuple(_HALF)
# heads that do not fill their tile hold masks in registers as well: the row of 128 would spill more
_UNFILLED = {
    (90, "backward_dkv", 128): TileConfig(32, 128, 8, 2),
    (90, "backward_dkv_grouped", 128): TileConfig(32, 128, 8, 2),
    (80, "backward_dq", 128): TileConfig(128, 32, 8, 3),
    (86, "backward_dq", 128): TileConfig(128, 32, 8, 3),
    (89, "backward_dq", 128): TileConfig(128, 32, 8, 3),
    (120, "forward", 128): TileConfig(128, 32, 8, 1, reload_q=True),
    (120, "backward_dq", 128): TileConfig(64, 64, 8, 2),
}


def tile(capability: int, direction: str, head_dim: int, dtype: torch.dtype) -> TileConfig:
    """The row of a kernel.

    Args:
        capability: a key of the architectures in arch.py.
        direction: one of DIRECTIONS.
        head_dim: D, padded here.
        dtype: of q.
    """
    padded = padded_head_dim(head_dim)
    if dtype == torch.float32:
        return _FLOAT32[direction][padded]
    row = _HALF[capability][direction][padded]
    return row if padded == head_dim else _UNFILLED.get((capability, direction, padded), row)
