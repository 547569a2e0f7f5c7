"""Keys and values of the tokens so far. A cache belongs to its caller, never to a module."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama_adapter.config import LlamaConfig

# capacities are rounded up to whole pages, so that paged attention reads a cache where it lies
PAGE_SIZE = 64


@dataclass(frozen=True)
class Span:
    """Where T new tokens of every sequence go, and what they see.

    Attributes:
        positions: (B, T) int32, each new token's slot and rotary position.
        cache_lengths: (B,) int32, cached tokens including the new ones.
        cu_seqlens_q: (B+1,) int32, starts of the sequences in B*T packed queries.
        cu_seqlens_k: (B+1,) int32, running sum of `cache_lengths`.
        longest: the greatest of `cache_lengths`, on the host.
    """

    positions: Tensor
    cache_lengths: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    longest: int


class KVCache:
    """Rotated keys and values of B sequences in every layer.

    Attributes:
        k, v: (n_layers, B, capacity, G, D).
        lengths: (B,) int32, cached tokens of each sequence.
        page_table: (B, capacity / PAGE_SIZE) int32, the same memory seen as pages.
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
        pages = (capacity + PAGE_SIZE - 1) // PAGE_SIZE
        shape = (config.n_layers, batch, pages * PAGE_SIZE, config.kv_heads, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        table = torch.arange(batch * pages, dtype=torch.int32, device=device)
        self.page_table = table.view(batch, pages)
        # the same on the host, where it is read without waiting for the device
        self._host_lengths = [0] * batch

    @property
    def capacity(self) -> int:
        """Tokens that one sequence can hold."""
        return self.k.shape[2]

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """This layer's keys and values as pages (N, PAGE_SIZE, G, D), for `page_table`."""
        shape = (-1, PAGE_SIZE, *self.k.shape[3:])
        return self.k[layer].view(shape), self.v[layer].view(shape)

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
        device = self.lengths.device
        steps = torch.arange(tokens, dtype=torch.int32, device=device)
        cache_lengths = self.lengths + tokens
        cu_seqlens_k = torch.nn.functional.pad(cache_lengths.cumsum(0, dtype=torch.int32), (1, 0))
        rows = torch.arange(len(self.lengths) + 1, dtype=torch.int32, device=device)
        return Span(
            positions=self.lengths[:, None] + steps,
            cache_lengths=cache_lengths,
            cu_seqlens_q=rows * tokens,
            cu_seqlens_k=cu_seqlens_k,
            longest=longest,
        )

    def advance(self, counts: list[int]) -> None:
        """Count `counts[b]` more tokens of sequence b as written; what lies beyond is free again.

        Raises:
            ValueError: the number of counts is not the number of sequences.
        """
        if len(counts) != len(self.lengths):
            raise ValueError(f"counts must have {len(self.lengths)} entries, got {len(counts)}")
        self.lengths += torch.tensor(counts, dtype=torch.int32).to(self.lengths.device)
        self._host_lengths = [a + b for a, b in zip(self._host_lengths, counts, strict=True)]
