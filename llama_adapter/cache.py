"""Keys and values of the tokens so far. A cache belongs to its caller, never to a module.

Memory is a pool of pages. `KVCache` gives every sequence of a batch its own pages once and for all;
an engine whose requests come and go takes pages from a pool and gives them back. Either way a
`Span` tells the model where new tokens go and what they see.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from llama_adapter.config import LlamaConfig

PAGE_SIZE = 64
# up to this many new tokens per sequence take the decoding kernel, longer chunks the varlen one
DECODE_TOKENS = 16


class PoolFull(ValueError):
    """A pool has fewer free pages than were asked for."""


def pages_for(tokens: int) -> int:
    """Pages that hold this many tokens of one sequence."""
    return -(-tokens // PAGE_SIZE)


class PagePool:
    """Pages of rotated keys and of values, in every layer, and which of them are free.

    Attributes:
        k, v: (n_layers, N, PAGE_SIZE, G, D).
        size: N pages.
    """

    def __init__(
        self,
        config: LlamaConfig,
        size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate the memory, all of it free.

        Args:
            config: the model's shape.
            size: pages N, of PAGE_SIZE tokens each.
            dtype: of the model's keys and values.
            device: of the model.

        Raises:
            ValueError: size is below 1.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1 page, got {size}")
        shape = (config.n_layers, size, PAGE_SIZE, config.kv_heads, config.head_dim)
        self.size = size
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        # a heap: the lowest pages go first, so that a sequence's often lie in order
        self._free = list(range(size))
        self._taken: set[int] = set()
        # views that every layer of every step asks for
        inner = (1, size * PAGE_SIZE, *shape[3:])
        self._layers = list(zip(self.k, self.v, strict=True))
        self._rows = [(k.view(inner), v.view(inner)) for k, v in self._layers]

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def device(self) -> torch.device:
        """Where the pages lie."""
        return self.k.device

    def take(self, count: int) -> list[int]:
        """Hand out `count` pages, which are the caller's until `give_back`.

        Raises:
            PoolFull: fewer are free; none is taken then.
        """
        if count > self.free:
            raise PoolFull(f"count must be at most the pool's {self.free} free pages, got {count}")
        pages = [heapq.heappop(self._free) for _ in range(count)]
        self._taken.update(pages)
        return pages

    def give_back(self, pages: Sequence[int]) -> None:
        """Free pages that were taken.

        Raises:
            ValueError: one of them is not taken, or named twice; none is freed then.
        """
        for page in pages:
            if page not in self._taken:
                raise ValueError(f"pages must be taken ones, got {page}, which is free")
        if len(set(pages)) != len(pages):
            raise ValueError(f"pages must differ, got {list(pages)}")
        for page in pages:
            self._taken.remove(page)
            heapq.heappush(self._free, page)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """This layer's keys and values as pages (N, PAGE_SIZE, G, D)."""
        return self._layers[layer]

    def row(self, layer: int) -> tuple[Tensor, Tensor]:
        """The same memory as one row of slots (1, N * PAGE_SIZE, G, D)."""
        return self._rows[layer]


@dataclass(frozen=True)
class Span:
    """Where new tokens of B sequences go, and what they see.

    The tokens are (B, T), or one row of all sequences' tokens, packed.

    Attributes:
        positions: like the tokens, int32: rotary position of each.
        slots: (1, number of tokens) int32: each one's place among all tokens of a pool, -1 if none.
        page_table: (B, max_pages) int32, the pages of each sequence in order.
        cache_lengths: (B,) int32, cached tokens including the new ones.
        cu_seqlens_q, cu_seqlens_k: (B+1,) int32, starts of the sequences in the packed tokens, and
            running sum of `cache_lengths`; None where the decoding kernel takes the tokens.
        longest_q, longest_k: no sequence has more new tokens, or tokens in all, known to the host.
            Rounded up, because compilers tell multiples of 16 from other numbers.
    """

    positions: Tensor
    slots: Tensor
    page_table: Tensor
    cache_lengths: Tensor
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    longest_q: int = 0
    longest_k: int = 0


def decode_span(cache_lengths: Tensor, page_table: Tensor) -> Span:
    """The newest token of every sequence, wherever its pages are; nothing waits for the device.

    Args:
        cache_lengths: (B,) int32, tokens of each sequence, the newest included; 0 is an empty slot.
        page_table: (B, max_pages) int32, pages of each sequence, of which those below its length
            are looked at.
    """
    positions = (cache_lengths - 1).clamp_(min=0)[:, None]
    page = page_table.gather(1, (positions // PAGE_SIZE).long())
    slots = torch.where(cache_lengths[:, None] > 0, page * PAGE_SIZE + positions % PAGE_SIZE, -1)
    return Span(positions, slots.view(1, -1), page_table, cache_lengths)


def packed_span(
    starts: Sequence[int],
    counts: Sequence[int],
    tables: Sequence[Sequence[int]],
    device: torch.device,
    width: int | None = None,
) -> Span:
    """The next tokens of several sequences, side by side in one row.

    Args:
        starts: tokens of each sequence that are cached already.
        counts: new tokens of each, at least one.
        tables: pages of each, enough for its tokens.
        device: of the pool.
        width: of the page table; None is the longest of `tables`.
    """
    lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    positions = [p for a, b in zip(starts, lengths, strict=True) for p in range(a, b)]
    slots = [
        pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE
        for pages, a, b in zip(tables, starts, lengths, strict=True)
        for p in range(a, b)
    ]
    width = width or max(map(len, tables))

    def on_device(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)

    return Span(
        on_device([positions]),
        on_device([slots]),
        on_device([[*pages, *[0] * (width - len(pages))] for pages in tables]),
        on_device(lengths),
        on_device([0, *accumulate(counts)]),
        on_device([0, *accumulate(lengths)]),
        -(-max(counts) // 16) * 16,
        pages_for(max(lengths)) * PAGE_SIZE,
    )


class KVCache:
    """Rotated keys and values of B sequences, each with pages of its own for all its tokens.

    Attributes:
        pool: the pages, those of a sequence side by side.
        lengths: (B,) int32, cached tokens of each sequence.
        page_table: (B, capacity / PAGE_SIZE) int32.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate an empty cache.

        Args:
            config: the model's shape.
            batch: sequences B.
            capacity: tokens per sequence, rounded up to a multiple of PAGE_SIZE.
            dtype: of the model's keys and values.
            device: of the model.

        Raises:
            ValueError: batch or capacity is below 1.
        """
        for name, value in (("batch", batch), ("capacity", capacity)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        pages = pages_for(capacity)
        self.pool = PagePool(config, batch * pages, dtype=dtype, device=device)
        self.capacity = pages * PAGE_SIZE
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        table = torch.tensor(self.pool.take(batch * pages), dtype=torch.int32)
        self.page_table = table.view(batch, pages).to(device)
        # the same on the host, where it is read without waiting for the device
        self._host_lengths = [0] * batch

    @property
    def k(self) -> Tensor:
        """Keys (n_layers, B, capacity, G, D): the same memory, each sequence in one piece."""
        return self.pool.k.flatten(1, 2).unflatten(1, (len(self.lengths), self.capacity))

    @property
    def v(self) -> Tensor:
        """Values, as `k`."""
        return self.pool.v.flatten(1, 2).unflatten(1, (len(self.lengths), self.capacity))

    def span(self, tokens: int) -> Span:
        """Describe the next `tokens` positions of every sequence, without writing them.

        Raises:
            ValueError: they do not fit.
        """
        longest = max(self._host_lengths) + tokens
        if longest > self.capacity:
            raise ValueError(
                f"cache capacity must be at least {longest} tokens for {tokens} more, "
                f"got {self.capacity}"
            )
        device, batch = self.lengths.device, len(self.lengths)
        steps = torch.arange(tokens, dtype=torch.int32, device=device)
        positions = self.lengths[:, None] + steps
        first = torch.arange(batch, dtype=torch.int32, device=device)[:, None] * self.capacity
        span = Span(
            positions, (first + positions).view(1, -1), self.page_table, self.lengths + tokens
        )
        if tokens <= DECODE_TOKENS:
            return span
        running = span.cache_lengths.cumsum(0, dtype=torch.int32)
        return Span(
            span.positions,
            span.slots,
            span.page_table,
            span.cache_lengths,
            torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens,
            torch.nn.functional.pad(running, (1, 0)),
            tokens,
            longest,
        )

    def advance(self, counts: list[int]) -> None:
        """Count `counts[b]` more tokens of sequence b as written; what lies beyond is free again.

        A negative count takes tokens back, as a rejected draft.

        Raises:
            ValueError: the number of counts is not the number of sequences, or a sequence would
                have fewer than no tokens or more than fit.
        """
        if len(counts) != len(self.lengths):
            raise ValueError(f"counts must have {len(self.lengths)} entries, got {len(counts)}")
        lengths = [a + b for a, b in zip(self._host_lengths, counts, strict=True)]
        if min(lengths) < 0 or max(lengths) > self.capacity:
            raise ValueError(
                f"counts must leave every sequence 0 to {self.capacity} tokens, got {lengths}"
            )
        self.lengths += torch.tensor(counts, dtype=torch.int32).to(self.lengths.device)
        self._host_lengths = lengths
