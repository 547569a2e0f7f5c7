"""Sequences without padding: one after the other in one row, each attending to itself alone.

Sequences that begin with the same tokens may share them: those are computed once, as a sequence of
their own, and their keys stand before those of all that share them. That is exact, because a token
sees only what comes before it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shared:
    """Beginnings that several sequences of a call share, F of them with at most L tokens.

    Attributes:
        spans: the first row of each among those of the call, and how many there are.
        rows: (F, L) int64, those rows; past a beginning's end any.
        index: (B,) int32, the beginning of every sequence, -1 for none.
        lengths: (F,) int32.
    """

    spans: tuple[tuple[int, int], ...]
    rows: Tensor
    index: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a call lie.

    Attributes:
        positions: (total,) int64 of every row in its own sequence.
        cu_seqlens: (B + 1,) int32, where the rows of each sequence begin and the last one ends.
        longest: no sequence has more of them.
        shared: beginnings that stand before the rows of some sequences, or None.
    """

    positions: Tensor
    cu_seqlens: Tensor
    longest: int
    shared: Shared | None = None

    def arguments(self, k: Tensor, v: Tensor) -> dict[str, Any]:
        """The arguments of zero_init_attention_varlen, of keys and values (total, G, D)."""
        found: dict[str, Any] = {
            "cu_seqlens_q": self.cu_seqlens,
            "cu_seqlens_k": self.cu_seqlens,
            "max_seqlen_q": self.longest,
            "max_seqlen_k": self.longest,
        }
        if self.shared is None:
            return {"k": k, "v": v, **found}
        found["prefix_index"], found["prefix_lengths"] = self.shared.index, self.shared.lengths
        for name, x in (("k", k), ("v", v)):
            found[name], found[f"prefix_{name}"] = _WithShared.apply(x, self.shared)
        return found


class _WithShared(torch.autograd.Function):
    """Rows of a tensor, and those of them that are shared as a bank (F, L, G, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
        ctx.shared = shared
        return x.view_as(x), x[shared.rows]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        dx, dbank = gradients
        # what attention made is nobody else's: a copy of all rows would cost more than the sum
        for (start, length), own in zip(ctx.shared.spans, dbank, strict=True):
            dx[start : start + length] += own[:length]
        return dx, None
