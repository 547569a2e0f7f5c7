"""Sequences without padding: one after the other in one row, each attending to itself alone.

Sequences that begin with the same tokens may share them: those are computed once, and their keys
are seen by all that share them. That is exact, because a token sees only what comes before it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shared:
    """A beginning that several sequences share.

    Attributes:
        start, length: its rows among those of the call.
        places: (sharers, length) int64, where its keys lie in every sharer.
    """

    start: int
    length: int
    places: Tensor


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a call lie.

    Attributes:
        positions: (total,) int64 of every row in its own sequence.
        cu_seqlens_q: (B + 1,) int32, where the rows of each sequence begin and the last one ends.
        cu_seqlens_k: the same of the keys that each sees, its own and those of what it shares.
        longest_q, longest_k: no sequence has more of them.
        key_rows: (total_k,) int64, the row of every key; None where every row is one key in place.
        own: (total,) int64, where the key of every row lies that is the sequence's own.
        shared: beginnings that other sequences see as well.
    """

    positions: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    longest_q: int
    longest_k: int
    key_rows: Tensor | None = None
    own: Tensor | None = None
    shared: tuple[Shared, ...] = ()

    def bounds(self) -> dict[str, Any]:
        """The arguments of zero_init_attention_varlen."""
        return {
            "cu_seqlens_q": self.cu_seqlens_q,
            "cu_seqlens_k": self.cu_seqlens_k,
            "max_seqlen_q": self.longest_q,
            "max_seqlen_k": self.longest_k,
        }

    def keys(self, x: Tensor) -> Tensor:
        """Keys or values (total_k, G, D) of all sequences, of those (total, G, D) of the rows."""
        return x if self.key_rows is None else _Keys.apply(x, self)


class _Keys(torch.autograd.Function):
    """Rows of a tensor, some of them for many; their gradients are summed in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        assert packing.key_rows is not None
        ctx.packing = packing
        return x[packing.key_rows]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (dkeys,), packing = gradients, ctx.packing
        dx = dkeys[packing.own]
        for one in packing.shared:
            rows = slice(one.start, one.start + one.length)
            # in float32: half precision would lose what the last of many add
            added = dkeys[one.places].sum(0, dtype=torch.promote_types(dx.dtype, torch.float32))
            dx[rows] = (dx[rows] + added).to(dx.dtype)
        return dx, None
