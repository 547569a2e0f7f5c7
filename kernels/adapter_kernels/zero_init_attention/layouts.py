"""How every form of the public inputs becomes the one form of reference.py, and results return.

Dense, packed (varlen), cached and paged keys, three forms of a prompt and grouped heads all end as
the rows (B,G,N,D) of one key head, its keys (B,G,S,D) and a bias. Nothing here waits for a GPU: an
index out of range is clamped there, never looked at.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import HIDDEN, Segment


class Prompts(NamedTuple):
    """The prompt arguments of a public function, in one of their three forms, or all None."""

    k: Tensor | None
    v: Tensor | None
    gate: Tensor | None
    adapter_index: Tensor | None
    lengths: Tensor | None


class Prefix(NamedTuple):
    """Keys and values (F, L, G, D) that packed sequences see before their own, or all None.

    index (B,) names a sequence's prefix, -1 for none; lengths (F,) are the rows that count.
    """

    k: Tensor | None = None
    v: Tensor | None = None
    index: Tensor | None = None
    lengths: Tensor | None = None


class Layout(NamedTuple):
    """Where the sequences lie: padded (key_starts, key_lengths) or packed (the other arguments)."""

    key_starts: Tensor | None
    key_lengths: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    page_table: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool


class Padded(NamedTuple):
    """q (B,T,H,D), k and v (B,S,G,D), and what the rows of q see of them (a Segment's fields)."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    blind: Tensor | None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that is computed in: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def as_rows(x: Tensor, groups: int) -> Tensor:
    """(B,T,H,D) as (B,G,N,D): token t of head g R + r is row r T + t of key head g; R = H / G."""
    b, t, h, d = x.shape
    x = x.view(b, t, groups, h // groups, d).permute(0, 2, 3, 1, 4)
    return x.reshape(b, groups, h // groups * t, d)


def to_rows(x: Tensor, groups: int) -> Tensor:
    """The same, contiguous and in the dtype that is computed in."""
    return as_rows(x.to(wide(x.dtype)), groups).contiguous()


def from_rows(x: Tensor, like: Tensor) -> Tensor:
    """(B,G,N,D) as a contiguous (B,T,H,D) of the shape of `like`, in the dtype of x."""
    b, t, h, d = like.shape
    x = x.view(b, x.shape[1], h // x.shape[1], t, d).permute(0, 3, 1, 2, 4)
    return x.reshape(b, t, h, d).contiguous()


def visibility(
    q: Tensor,
    k: Tensor,
    offset: Tensor | None = None,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    before: Tensor | None = None,
    columns: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """Bias and blind rows of a Segment: a row sees starts <= j < ends and j <= i + offset.

    The offset, a sequence's keys less its queries, makes the diagonal the bottom-right one; without
    it there is no diagonal. All are (B,), or (1,) for sequences that are alike. The first `columns`
    keys are a prefix's, `before` of which stand before a sequence's own: j counts from behind them.
    """
    t, keys, repeats = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    j = torch.arange(keys, device=q.device) - columns
    rules = []
    if offset is not None:
        i = torch.arange(t, device=q.device)[:, None]
        rules.append(j <= i + offset[:, None, None])
    if starts is not None:
        rules.append(j >= starts[:, None, None])
    if ends is not None:
        rules.append(j < ends[:, None, None])
    if not rules:
        return None, None
    seen = rules[0]
    for rule in rules[1:]:
        seen = seen & rule
    if before is not None:
        c, length = j + columns, before[:, None, None]
        of_prefix = c < length
        if offset is not None:
            i = torch.arange(t, device=q.device)[:, None]
            of_prefix = of_prefix & (c <= i + offset[:, None, None] + length)
        seen = torch.where(j < 0, of_prefix, seen)
    blind = ~seen.any(-1, keepdim=True)
    bias = torch.where(seen | blind, 0.0, HIDDEN)
    # every query head of a group repeats the same T rows
    shape, width = (seen.shape[0], 1, repeats * t), (-1, repeats, t, -1)
    bias = bias[:, None].expand(width).reshape(*shape, keys)
    return bias, blind[:, None].expand(width).reshape(*shape, 1)


def blank(x: Tensor, starts: Tensor | None, ends: Tensor | None) -> Tensor:
    """x (B,S,G,D) with zeros where no row may look: padding may hold NaN, and 0 * NaN is NaN."""
    j = torch.arange(x.shape[1], device=x.device)
    if starts is not None:
        x = x.masked_fill((j < starts[:, None])[:, :, None, None], 0.0)
    if ends is not None:
        x = x.masked_fill((j >= ends[:, None])[:, :, None, None], 0.0)
    return x


def bank_rows(adapter_index: Tensor, adapters: int) -> tuple[Tensor, Tensor]:
    """The bank's row of every sequence, and whether it has one at all; without one the row is 0."""
    present = (adapter_index >= 0) & (adapter_index < adapters)
    return adapter_index.long().masked_fill(~present, 0), present


def prompt_segment(q: Tensor, prompts: Prompts) -> Segment | None:
    """The prompt of every sequence of q (B,T,H,D), whichever of the three forms it came in."""
    k, v, gate, adapter_index, lengths = prompts
    if k is None or v is None or gate is None:
        return None
    b, t, h, _ = q.shape
    bias = None
    if adapter_index is not None:
        row, present = bank_rows(adapter_index, k.shape[0])
        length = present * k.shape[1]
        if lengths is not None:
            length = torch.minimum(length, lengths[row])
        k, v = blank(k[row], None, length), blank(v[row], None, length)
        gate = gate[row].masked_fill((length <= 0)[:, None], 0.0)
        bias, _ = visibility(q, k, ends=length)
    groups = k.shape[-2]
    k, v = to_rows(k.expand(b, -1, -1, -1), groups), to_rows(v.expand(b, -1, -1, -1), groups)
    gate = gate.to(k.dtype).expand(b, h)[..., None].expand(b, h, t)
    return Segment(k, v, bias, gate=gate.reshape(b, groups, h // groups * t, 1))


class PromptGroup(NamedTuple):
    """The prompts of some sequences, all of one length: k and v (B', P, G, D) and gate (B', H)."""

    sequences: list[int]
    k: Tensor
    v: Tensor
    gate: Tensor


def prompt_groups(prompts: Prompts, sequences: list[int]) -> Iterator[PromptGroup]:
    """Prompts of these sequences where they lie, on a CPU; those without one are left out."""
    k, v, gate, adapter_index, lengths = prompts
    if k is None or v is None or gate is None:
        return
    count = len(sequences)
    if adapter_index is None:
        parts = []
        for x, bare in ((k, 3), (v, 3), (gate, 1)):
            shared, whole = x.dim() == bare, len(x) == count
            parts.append(x.expand(count, *x.shape) if shared else x if whole else x[sequences])
        yield PromptGroup(sequences, parts[0], parts[1], parts[2])
        return
    index = adapter_index.tolist()
    # the length of a sequence without an adapter is some other's, and not looked at
    sizes = None if lengths is None else lengths[adapter_index.long()].tolist()
    groups: dict[int, list[int]] = {}
    for b in sequences:
        if 0 <= index[b] < k.shape[0]:
            groups.setdefault(k.shape[1] if sizes is None else sizes[b], []).append(b)
    for length, members in groups.items():
        if length > 0:
            rows = [index[b] for b in members]
            # one adapter for all is looked at where it lies
            alike = len(rows) == 1 or len(set(rows)) == 1
            where = slice(rows[0], rows[0] + 1) if alike else rows
            own = [k[where, :length], v[where, :length], gate[where]]
            if len(rows) > own[0].shape[0]:
                own = [x.expand(len(rows), *x.shape[1:]) for x in own]
            yield PromptGroup(members, own[0], own[1], own[2])


def sum_to(x: Tensor, like: Tensor, adapter_index: Tensor | None) -> Tensor:
    """Gradients x (B,...) of every sequence summed into the form of `like`, then rounded once."""
    if adapter_index is not None:
        adapters = like.shape[0]
        row, present = bank_rows(adapter_index, adapters)
        # sequences without an adapter add to a row of their own, which is dropped
        bank = x.new_zeros(adapters + 1, *x.shape[1:])
        x = bank.index_add_(0, row.masked_fill(~present, adapters), x)[:adapters]
    elif x.dim() > like.dim():
        x = x.sum(0)
    return x.to(like.dtype).contiguous()


def unpack(x: Tensor, cu_seqlens: Tensor | None, longest: int) -> Tensor:
    """Packed (total,H,D) as (B,longest,H,D), zero past a sequence's end; x itself if not packed."""
    if cu_seqlens is None:
        return x
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    row = starts + torch.arange(longest, device=x.device)
    if x.shape[0] == 0:
        return x.new_zeros(*row.shape, *x.shape[1:])
    return x[row.clamp(0, x.shape[0] - 1)].masked_fill_((row >= ends)[:, :, None, None], 0.0)


def pack(x: Tensor, cu_seqlens: Tensor | None, total: int) -> Tensor:
    """(B,longest,...) as packed (total,...), the way back of `unpack`."""
    if cu_seqlens is None:
        return x
    if x.shape[0] * x.shape[1] == 0:
        return x.new_zeros(total, *x.shape[2:])
    row = torch.arange(total, device=x.device)
    owner = torch.searchsorted(cu_seqlens[1:].long(), row, right=True).clamp(max=x.shape[0] - 1)
    return x[owner, (row - cu_seqlens[owner]).clamp(0, x.shape[1] - 1)]


def cached_keys(
    k: Tensor, v: Tensor, page_table: Tensor | None, lengths: Tensor, keys: int
) -> tuple[Tensor, Tensor]:
    """The first S = `keys` keys and values of each sequence's cache, (B,S,G,D).

    k and v are caches (B,S_max,G,D), or pages (N,page,G,D) that the table puts in order. Only what
    lies below a sequence's length is read: later keys repeat its last one.
    """
    pages, page, groups, d = k.shape
    last = lengths[:, None].long().sub(1).clamp(0, max(keys - 1, 0))
    j = torch.arange(keys, device=k.device).minimum(last)
    if page_table is None:
        row = j + torch.arange(pages, device=k.device)[:, None] * page
    else:
        row = page_table.long().gather(1, j // page).clamp(0, pages - 1) * page + j % page
    # gathered head by head, the order of to_rows, which then has nothing to copy
    head = row[:, None] * groups + torch.arange(groups, device=k.device)[:, None]
    shape, head = (*head.shape, d), head.flatten()
    k, v = k.reshape(-1, d).index_select(0, head), v.reshape(-1, d).index_select(0, head)
    return k.view(shape).transpose(1, 2), v.view(shape).transpose(1, 2)


def prefixes(prefix: Prefix) -> tuple[Tensor, Tensor, Tensor] | None:
    """k and v (B, L, G, D) of every sequence's prefix, 0 past its length (B,)."""
    k, v, index, lengths = prefix
    if k is None or v is None or index is None:
        return None
    row, present = bank_rows(index, k.shape[0])
    length = present * k.shape[1]
    if lengths is not None:
        length = torch.minimum(length, lengths[row])
    return blank(k[row], None, length), blank(v[row], None, length), length


def pad(q: Tensor, k: Tensor, v: Tensor, prefix: Prefix, layout: Layout) -> Padded:
    """Dense or packed q, k, v with their bias, as reference.py wants them but for the heads.

    Keys of prefixes come before a sequence's own.
    """
    starts, ends, cu_q, cu_k, page_table, max_q, max_k, causal = layout
    if cu_q is None or cu_k is None:
        offset = torch.full((1,), k.shape[1] - q.shape[1], device=q.device) if causal else None
        bias, blind = visibility(q, k, offset, starts, ends)
        if starts is None and ends is None and k.shape[1] >= q.shape[1]:
            blind = None
        return Padded(q, blank(k, starts, ends), blank(v, starts, ends), bias, blind)
    q, lengths = unpack(q, cu_q, max_q), cu_k.diff().clamp(max=max_k)
    if page_table is None:
        k, v = unpack(k, cu_k, max_k), unpack(v, cu_k, max_k)
    else:
        k, v = cached_keys(k, v, page_table, lengths, max_k)
        # a sequence without keys has nothing of its own to repeat
        none = (lengths == 0)[:, None, None, None]
        k, v = k.masked_fill(none, 0.0), v.masked_fill(none, 0.0)
    offset = lengths - cu_q.diff() if causal else None
    before, columns = prefixes(prefix), 0
    length = None
    if before is not None:
        columns, length = before[0].shape[1], before[2]
        k, v = torch.cat([before[0], k], 1), torch.cat([before[1], v], 1)
    return Padded(q, k, v, *visibility(q, k, offset, None, lengths, length, columns))
