"""Attention to the tokens by the best library of the machine, forward and backward, with its lse.

Called through aten's own operations, which give and take the lse, so that what they saved can be
kept by ours. On the CPU that is torch's flash kernel; on a GPU FlashAttention 2 or cuDNN's.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten
# one attention without padding: q, k, v, causal (diagonal at the top left), scale -> out, lse
Forward = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
# dout, q, k, v, out, lse, causal, scale -> dq, dk, dv
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, Tensor]
]


class Library(NamedTuple):
    """Both directions of one library, on (B, H, T, D) with as many key heads as query heads."""

    forward: Forward
    backward: Backward


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    op = _aten._scaled_dot_product_flash_attention_for_cpu.default
    out, lse = op(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def cpu_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention of (B, H, T, D) by the CPU's kernel, whose scores take a bias (T, S)."""
    op = _aten._scaled_dot_product_flash_attention_for_cpu.default
    return op(q, k, v, 0.0, False, attn_mask=bias, scale=scale)[0]


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    return op(dout, q, k, v, out, lse, 0.0, causal, scale=scale)


def _no_random_state(q: Tensor) -> tuple[Tensor, Tensor]:
    """Seed and offset of a dropout that never happens."""
    seed = q.new_zeros((), dtype=torch.int64)
    return seed, seed


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    op = _aten._scaled_dot_product_flash_attention.default
    out, lse, *_ = op(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = _aten._scaled_dot_product_flash_attention_backward.default
    lengths = (None, None, q.shape[2], k.shape[2])
    return op(dout, q, k, v, out, lse, *lengths, 0.0, causal, *_no_random_state(q), scale=scale)


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    op = _aten._scaled_dot_product_cudnn_attention.default
    out, lse, *_ = op(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse.reshape(q.shape[:3])


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = _aten._scaled_dot_product_cudnn_attention_backward.default
    lengths = (None, None, q.shape[2], k.shape[2])
    return op(
        dout, q, k, v, out, lse[..., None], *_no_random_state(q), None, *lengths, 0.0, causal,
        scale=scale,
    )  # fmt: skip


LIBRARIES = {
    "cpu": Library(_cpu_forward, _cpu_backward),
    "flash": Library(_flash_forward, _flash_backward),
    "cudnn": Library(_cudnn_forward, _cudnn_backward),
}


def heads_first(x: Tensor, repeats: int = 1) -> Tensor:
    """(B, T, H, D) as (B, H, T, D), each head `repeats` times."""
    x = x.transpose(1, 2)
    return x if repeats == 1 else x.repeat_interleave(repeats, 1)


def _key_gradient(x: Tensor, repeats: int) -> Tensor:
    """(B, H, S, D) as (B, S, G, D), summed over the query heads of a key head in float32."""
    if repeats > 1:
        x = x.unflatten(1, (-1, repeats)).sum(2, dtype=torch.float32)
    return x.transpose(1, 2)


class _Parts(NamedTuple):
    """Which calls make up one attention: rows from `blind` on see keys below `whole`, all of them,
    and keys from there to below `end` up to their own diagonal."""

    blind: int
    whole: int
    end: int


def _parts(tokens: int, keys: int, offset: int | None) -> _Parts:
    """Row i sees keys j <= i + offset, or all of them."""
    if offset is None:
        return _Parts(0, keys, keys)
    blind = min(max(-offset, 0), tokens)
    whole = min(max(offset, 0), keys)
    return _Parts(blind, whole, min(keys, whole + tokens - blind) if offset < keys else keys)


def _merge(out: Tensor, lse: Tensor, out_2: Tensor, lse_2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: out (H, T, D) and lse (H, T)."""
    both = torch.logaddexp(lse, lse_2)
    merged = out * (lse - both).exp()[..., None] + out_2 * (lse_2 - both).exp()[..., None]
    return merged.to(out.dtype), both


def attend(
    q: Tensor, k: Tensor, v: Tensor, offset: int | None, scale: float, library: Library
) -> tuple[Tensor, Tensor]:
    """Attention in which row i sees keys j <= i + offset, or all of them.

    No library masks what lies off its own diagonal, so a diagonal elsewhere is two calls, whose
    results their lse merge. None of them returns a usable lse for rows without keys either.

    Args:
        q: (B, T, H, D).
        k, v: (B, S, G, D).
        offset: see above; None is no diagonal.
        scale: of the scores.
        library: one that the device and the dtype have.

    Returns:
        out (B, T, H, D) in the dtype of q and lse (B, H, T) float32, -inf where no key is seen.
    """
    (batch, tokens, heads, _), keys = q.shape, k.shape[1]
    repeats = heads // k.shape[2]
    blind, whole, end = _parts(tokens, keys, offset)
    calls = [(0, whole, False), (whole, end, True)]
    calls = [call for call in calls if call[1] > call[0] and batch * (tokens - blind) * heads]
    rows, results = heads_first(q[:, blind:]), []
    for start, stop, causal in calls:
        k_part, v_part = (heads_first(x[:, start:stop], repeats) for x in (k, v))
        results.append(library.forward(rows, k_part, v_part, causal, scale))
    if not results:
        return q.new_zeros(q.shape), q.new_full(
            (batch, heads, tokens), -torch.inf, dtype=torch.float32
        )
    out, lse = results[0]
    if len(results) == 2:
        # one sequence at a time: vectorised exponentials differ from those of a remainder
        merged = [_merge(*(part[b] for call in results for part in call)) for b in range(batch)]
        out, lse = (torch.stack(parts) for parts in zip(*merged, strict=True))
    out, lse = out.transpose(1, 2), lse.float()
    if blind:
        out = torch.cat([out.new_zeros(batch, blind, *out.shape[2:]), out], 1)
        lse = torch.cat([lse.new_full((batch, heads, blind), -torch.inf), lse], 2)
    return out, lse


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offset: int | None,
    scale: float, library: Library,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv of `attend`, given its out and lse.

    A library rebuilds P = exp(S - lse) and delta = rowsum(dO o out) from what it is given, so each
    call with the merged out and lse gives its own part of the gradients.
    """
    (b, tokens, heads, _), keys = q.shape, k.shape[1]
    repeats = heads // k.shape[2]
    blind, whole, end = _parts(tokens, keys, offset)
    if b * tokens * heads and blind == 0 and keys in (whole, end) and whole in (0, keys):
        # one call is all: its gradients are the whole ones
        k_heads, v_heads = (heads_first(x, repeats) for x in (k, v))
        rows = [heads_first(x) for x in (dout, q, out)]
        dq_heads, dk_heads, dv_heads = library.backward(
            rows[0], rows[1], k_heads, v_heads, rows[2], lse, whole == 0, scale
        )
        grads = _key_gradient(dk_heads, repeats), _key_gradient(dv_heads, repeats)
        return dq_heads.transpose(1, 2), *grads
    dq, dk, dv = (x.new_zeros(x.shape, dtype=torch.float32) for x in (q, k, v))
    if b * (tokens - blind) * heads == 0:
        return dq, dk, dv
    rows = [heads_first(x[:, blind:]) for x in (dout, q, out)]
    for start, stop, causal in ((0, whole, False), (whole, end, True)):
        if stop > start:
            k_part, v_part = (heads_first(x[:, start:stop], repeats) for x in (k, v))
            dq_part, dk_part, dv_part = library.backward(
                rows[0], rows[1], k_part, v_part, rows[2], lse[..., blind:], causal, scale
            )
            dq[:, blind:] += dq_part.transpose(1, 2)
            dk[:, start:stop] += _key_gradient(dk_part, repeats)
            dv[:, start:stop] += _key_gradient(dv_part, repeats)
    return dq, dk, dv
