"""The hybrid backend of the operations: a library attends to the tokens, a kernel adds the prompt.

What it keeps for the backward pass in place of `out` is the tokens' own output, from which the
library takes its delta; the prompt's part is computed again, from one tile of scores.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from adapter_kernels.backend import INTERPRETED

from . import reference_launch
from .dispatch import library_of
from .kernel_arguments import aligned_rows
from .layouts import Layout, Prefix, PromptGroup, Prompts, as_rows, from_rows, prompt_groups
from .library_attention import Library, attend, attend_backward, cpu_rows, heads_first


class _Piece(NamedTuple):
    """Sequences that one call can take: their rows of q, of k and v, their diagonal, and where in
    the bank the keys lie that come before those."""

    q: tuple[slice, ...]
    k: tuple[slice, ...]
    lse: tuple[slice, ...]
    offset: int | None
    prefix: tuple[int, slice] | None = None


def _pieces(q: Tensor, k: Tensor, prefix: Prefix, layout: Layout) -> Iterator[_Piece]:
    """The whole batch where its sequences are alike, else one sequence at a time (on the CPU)."""
    causal = layout.causal
    if layout.cu_seqlens_q is not None and layout.cu_seqlens_k is not None:
        starts = (layout.cu_seqlens_q.tolist(), layout.cu_seqlens_k.tolist())
        for b in range(len(starts[0]) - 1):
            rows, keys = (slice(cu[b], cu[b + 1]) for cu in starts)
            offset = (keys.stop - keys.start) - (rows.stop - rows.start)
            before = _prefix_of(prefix, b)
            offset += before[1].stop if before else 0
            yield _Piece((rows,), (keys,), (slice(None), rows), offset if causal else None, before)
        return
    offset = k.shape[1] - q.shape[1]
    if layout.key_starts is None and layout.key_lengths is None:
        whole = (slice(None),)
        yield _Piece(whole, whole, whole, offset if causal else None)
        return
    batch, keys = k.shape[:2]
    starts = [0] * batch if layout.key_starts is None else layout.key_starts.tolist()
    ends = [keys] * batch if layout.key_lengths is None else layout.key_lengths.tolist()
    for b in range(batch):
        own = slice(b, b + 1)
        seen = slice(starts[b], max(starts[b], ends[b]))
        yield _Piece((own,), (own, seen), (own,), offset - starts[b] if causal else None)


def _prefix_of(prefix: Prefix, b: int) -> tuple[int, slice] | None:
    """Where the keys before those of a packed sequence lie, on a CPU."""
    if prefix.k is None or prefix.index is None:
        return None
    row, length = int(prefix.index[b]), prefix.k.shape[1]
    if not 0 <= row < prefix.k.shape[0]:
        return None
    if prefix.lengths is not None:
        length = min(max(int(prefix.lengths[row]), 0), length)
    return row, slice(0, length)


def _batched(x: Tensor, index: tuple[slice, ...], packed: bool) -> Tensor:
    return x[index][None] if packed else x[index]


def _keys(x: Tensor, bank: Tensor | None, piece: _Piece, packed: bool) -> Tensor:
    """The keys or values of a piece, a prefix before its own."""
    own = _batched(x, piece.k, packed)
    if bank is None or piece.prefix is None:
        return own
    return torch.cat([bank[piece.prefix][None], own], 1)


def prompt_module(q: Tensor) -> ModuleType:
    """What computes the prompt segment beside the library."""
    if q.device.type == "cuda" or (INTERPRETED and q.dtype != torch.bfloat16):
        from . import triton_launch

        return triton_launch
    return reference_launch


def readable(x: Tensor) -> Tensor:
    """x as libraries of a GPU read it, 16 bytes at a time and never one row for many."""
    if x.device.type != "cuda" or x.numel() == 0:
        return x
    repeated = any(size > 1 and step == 0 for size, step in zip(x.shape, x.stride(), strict=True))
    return x.contiguous() if repeated else aligned_rows(x)


def tokens(
    q: Tensor, k: Tensor, v: Tensor, prefix: Prefix, layout: Layout, scale: float
) -> tuple[Tensor, Tensor]:
    """The tokens' own output, like q, and lse (B,H,T), or (H,total_q) of packed sequences."""
    library, packed = library_of(q), layout.cu_seqlens_q is not None
    if layout.page_table is not None:
        k, v, layout = _out_of_pages(k, v, layout, layout.page_table)
    q, k, v = map(readable, (q, k, v))
    pieces = list(_pieces(q, k, prefix, layout))
    if len(pieces) == 1 and not packed:
        (piece,) = pieces
        out, lse = attend(q, k[piece.k], v[piece.k], piece.offset, scale, library)
        return out.contiguous(), lse.contiguous()
    *batch, rows, heads, _ = q.shape
    out = q.new_zeros(q.shape)
    lse = q.new_full((*batch, heads, rows), -torch.inf, dtype=torch.float32)
    for piece in pieces:
        part_q = _batched(q, piece.q, packed)
        part_k, part_v = _keys(k, prefix.k, piece, packed), _keys(v, prefix.v, piece, packed)
        part, part_lse = attend(part_q, part_k, part_v, piece.offset, scale, library)
        out[piece.q] = part[0] if packed else part
        lse[piece.lse] = part_lse[0] if packed else part_lse
    return out, lse


def _out_of_pages(
    k: Tensor, v: Tensor, layout: Layout, page_table: Tensor
) -> tuple[Tensor, Tensor, Layout]:
    """Packed keys and values (total_k, G, D) of the sequences in a paged cache, on a CPU."""
    assert layout.cu_seqlens_k is not None, "op.py lets no pages pass without cu_seqlens"
    # pages do not follow one another as packed keys do: only the lengths count
    lengths = layout.cu_seqlens_k.diff()
    found = [
        torch.cat([
            _cached(pool, pages, length)
            for pages, length in zip(page_table.tolist(), lengths.tolist(), strict=True)
            if length
        ] or [pool[0, :0]])
        for pool in (k, v)
    ]  # fmt: skip
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return found[0], found[1], layout._replace(cu_seqlens_k=starts, page_table=None)


def attention(
    q: Tensor, k: Tensor, v: Tensor, prompts: Prompts, prefix: Prefix, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The result like q, its lse, and the tokens' own output where a prompt was added to it."""
    own, lse = tokens(q, k, v, prefix, layout, scale)
    if prompts.k is None:
        return own, lse, q.new_empty(0)
    where, longest = layout.cu_seqlens_q, layout.max_seqlen_q
    if layout.page_table is not None:
        # forward only, so that nothing must be what the backward pass computes again
        return _with_packed_prompts(own, q, prompts, where, scale), lse, own
    return prompt_module(q).prompt(q, prompts, where, own, scale, longest), lse, own


def _with_prompts(
    own: Tensor, q: Tensor, prompts: Prompts, present: list[int], scale: float
) -> Tensor:
    """own, like q, plus the gated prompts of the sequences that are `present`, on a CPU."""
    for group in prompt_groups(prompts, present):
        some = group.sequences
        if len(some) == len(q):
            own = _gated(own, q, group, scale)
        else:
            own[some] = _gated(own[some], q[some], group, scale)
    return own


def _with_packed_prompts(
    own: Tensor, q: Tensor, prompts: Prompts, cu_seqlens_q: Tensor | None, scale: float
) -> Tensor:
    """The same for packed sequences (total_q, H, D), one at a time; own stays as it is."""
    assert cu_seqlens_q is not None, "op.py lets no pages pass without cu_seqlens"
    out, starts = own.clone(), cu_seqlens_q.tolist()
    for group in prompt_groups(prompts, list(range(len(starts) - 1))):
        for n, b in enumerate(group.sequences):
            one = PromptGroup([b], *(x[n : n + 1] for x in group[1:]))
            rows = slice(starts[b], starts[b + 1])
            if rows.stop > rows.start:
                out[rows] = _gated(own[None, rows], q[None, rows], one, scale)[0]
    return out


def _gated(own: Tensor, q: Tensor, group: PromptGroup, scale: float) -> Tensor:
    """own (B', T, H, D) plus a group's prompts, each with its gate; in the dtype of own."""
    rows = as_rows(q, group.k.shape[2])
    added = cpu_rows(rows, heads_first(group.k), heads_first(group.v), None, scale)
    # two roundings, each the same wherever a number lies; one fused would be none's in remainders
    return (from_rows(added, q) * group.gate[:, None, :, None]).add_(own).to(own.dtype)


def _cached(pool: Tensor, pages: list[int], length: int) -> Tensor:
    """The first keys or values (length, G, D) in these pages: no copy where they lie in order."""
    used = pages[: -(-length // pool.shape[1])]
    first, last = used[0], used[-1]
    if first == last:
        return pool[first, :length]
    in_order = used == list(range(first, last + 1))
    return (pool[first : last + 1] if in_order else pool[used]).flatten(0, 1)[:length]


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prompts: Prompts,
    cache_lengths: Tensor,
    page_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    scale: float,
) -> Tensor:
    """The result like q, on a CPU: a call for each sequence's keys, one for prompts of a length."""
    assert (k_scale, v_scale) == (None, None), "dispatch.py sends 8 bits to the reference"
    lengths = cache_lengths.tolist()
    # an empty slot stays 0
    present = [b for b, length in enumerate(lengths) if length]
    (batch, tokens, heads, _), groups = q.shape, k_cache.shape[2]
    if not present or q.numel() == 0:
        return q.new_zeros(q.shape)
    rows = as_rows(q, groups)
    out = rows.new_zeros(rows.shape) if batch > 1 else rows
    tables = None if page_table is None else page_table.tolist()
    for b in present:
        length, bias = lengths[b], None
        if tokens > 1:
            last = torch.arange(length - tokens, length)[:, None]
            hidden = torch.arange(length) > last
            bias = q.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
            bias = bias.repeat(heads // groups, 1)
        if tables is None:
            keys, values = k_cache[b, :length], v_cache[b, :length]
        else:
            keys, values = (_cached(pool, tables[b], length) for pool in (k_cache, v_cache))
        keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        if batch == 1:
            out = cpu_rows(rows, keys, values, bias, scale)
        else:
            out[b] = cpu_rows(rows[b : b + 1], keys, values, bias, scale)[0]
    return _with_prompts(from_rows(out, q), q, prompts, present, scale)


def token_gradients(
    dout: Tensor, dlse: Tensor | None, own: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    prefix: Prefix, layout: Layout, scale: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dq, dk, dv of the tokens' segment and of prefix_k and prefix_v, in their dtype or float32."""
    library, packed = library_of(q), layout.cu_seqlens_q is not None
    dout, q, k, v = map(readable, (dout, q, k, v))
    pieces = list(_pieces(q, k, prefix, layout))
    if len(pieces) == 1 and not packed and dlse is None and pieces[0].k == (slice(None),):
        found = attend_backward(dout, q, k, v, own, lse, pieces[0].offset, scale, library)
        return *found, None, None
    dq, dk, dv = (x.new_zeros(x.shape, dtype=torch.float32) for x in (q, k, v))
    banks = [None if x is None else x.new_zeros(x.shape, dtype=torch.float32) for x in prefix[:2]]
    for piece in pieces:
        part_dout, part_q, part_own = (_batched(x, piece.q, packed) for x in (dout, q, own))
        part_k, part_v = _keys(k, prefix.k, piece, packed), _keys(v, prefix.v, piece, packed)
        part_lse = _batched(lse, piece.lse, packed)
        parts = attend_backward(
            part_dout, part_q, part_k, part_v, part_own, part_lse, piece.offset, scale, library
        )
        if dlse is not None:
            part_dlse = _batched(dlse, piece.lse, packed)
            added = _lse_gradients(
                part_dlse, part_q, part_k, part_v, part_lse, piece.offset, scale, library
            )
            parts = (parts[0] + added[0], parts[1] + added[1], parts[2])
        dq[piece.q] = parts[0][0] if packed else parts[0]
        for total, bank, part in zip((dk, dv), banks, parts[1:], strict=True):
            columns = 0
            if bank is not None and piece.prefix is not None:
                columns = piece.prefix[1].stop
                bank[piece.prefix] += part[0, :columns]
            total[piece.k] = part[0, columns:] if packed else part
    return dq, dk, dv, *banks


def _lse_gradients(
    dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, offset: int | None, scale: float,
    library: Library,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """scale dlse P K for dq and scale P^T (dlse o Q) for dk: what dS = P o dlse passes on.

    P K is attention to the keys as values, P^T X the gradient of values for a dO of X.
    """
    weight = dlse.masked_fill(lse == -torch.inf, 0.0).transpose(1, 2)[..., None] * scale
    seen, _ = attend(q, k, k, offset, scale, library)
    weighted = (q * weight).to(q.dtype)
    _, _, pulled = attend_backward(weighted, q, k, v, seen, lse, offset, scale, library)
    return seen * weight, pulled


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    own: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompts: Prompts,
    prefix: Prefix,
    layout: Layout,
    scale: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, prompt_k, prompt_v, gate, prefix_k, prefix_v.

    `own` is the tokens' output of the forward pass.
    """
    dq = dk = dv = dprefix_k = dprefix_v = None
    prompt_gradients = tuple(q.new_empty(0) for _ in range(3))
    if any(needs[:3]) or any(needs[6:]):
        dq, dk, dv, dprefix_k, dprefix_v = token_gradients(
            dout, dlse, own, lse, q, k, v, prefix, layout, scale
        )
    if prompts.k is not None and (needs[0] or any(needs[3:6])):
        asked, longest = (needs[0], *needs[3:6]), layout.max_seqlen_q
        dq_prompt, *prompt_gradients = prompt_module(q).prompt_backward(
            dout, q, prompts, layout.cu_seqlens_q, scale, asked, longest
        )
        dq = dq + dq_prompt if needs[0] and dq is not None else dq
    dq, dk, dv, dprefix_k, dprefix_v = (
        x.to(q.dtype) if need and x is not None else q.new_empty(0)
        for x, need in zip(
            (dq, dk, dv, dprefix_k, dprefix_v), (*needs[:3], *needs[6:]), strict=True
        )
    )
    return dq, dk, dv, *prompt_gradients, dprefix_k, dprefix_v
