"""What must hold of decoding, whatever computes it? Caches, pages, checks on the public calls."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adapter_kernels import (
    zero_init_attention,
    zero_init_attention_decode,
    zero_init_attention_varlen,
)
from adapter_kernels.zero_init_attention.library import decode_op
from tests.adapter_kernels.tolerances import check_bitwise, check_identity
from tests.adapter_kernels.zero_init_attention import cases
from tests.adapter_kernels.zero_init_attention.cases import int32, normal

HEADS, GROUPS, ADAPTERS, ROWS = 6, 2, 4, 9
PROMPT_NAMES = ("prompt_k", "prompt_v", "gate", "adapter_index", "prompt_lengths")


@dataclass
class Cache:
    """A decoding call: B = 3, H = 6, G = 2, a bank of 4 adapters with 9 rows or fewer."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_lengths: Tensor
    prompts: dict[str, Tensor]
    page_table: Tensor | None = None

    def call(self, **more: Any) -> Tensor:
        """The public function."""
        arguments = {"page_table": self.page_table, "backend": cases.BACKEND} | self.prompts | more
        with torch.no_grad():
            return zero_init_attention_decode(
                self.q, self.k_cache, self.v_cache, cache_lengths=self.cache_lengths, **arguments
            )

    def cast(self, dtype: torch.dtype) -> "Cache":
        """The same call in another dtype; gates stay in float32, or follow into float64."""

        def moved(name: str, x: Tensor) -> Tensor:
            wide = torch.promote_types(dtype, torch.float32)
            return x if not x.is_floating_point() else x.to(wide if name == "gate" else dtype)

        prompts = {name: moved(name, x) for name, x in self.prompts.items()}
        q, k, v = (moved("", x) for x in (self.q, self.k_cache, self.v_cache))
        return replace(self, q=q, k_cache=k, v_cache=v, prompts=prompts)

    def rows(self, *wanted: int) -> "Cache":
        """Some of the sequences alone."""
        chosen = list(wanted)
        prompts = dict(self.prompts)
        if "adapter_index" in prompts:
            prompts["adapter_index"] = prompts["adapter_index"][chosen]
        table = None if self.page_table is None else self.page_table[chosen]
        k, v = self.k_cache, self.v_cache
        if table is None:
            k, v = k[chosen], v[chosen]
        lengths = self.cache_lengths[chosen]
        return replace(
            self, q=self.q[chosen], k_cache=k, v_cache=v, cache_lengths=lengths,
            prompts=prompts, page_table=table,
        )  # fmt: skip


def operation(cache: Cache, backend: str) -> Tensor:
    """The operation below the checks, which takes float64 as well."""
    prompts = [cache.prompts.get(name) for name in PROMPT_NAMES]
    rest = (cache.cache_lengths, cache.page_table, None, None, cache.q.shape[-1] ** -0.5, backend)
    return decode_op(cache.q, cache.k_cache, cache.v_cache, *prompts, *rest)


def make_cache(
    tokens: int = 1, *, capacity: int = 70, head_dim: int = 16, form: str = "bank", seed: int = 0
) -> Cache:
    """A call in float32 whose sequences are full, short and in between; NaN lies past each."""
    g = torch.Generator().manual_seed(seed + tokens)
    q = normal(g, 3, tokens, HEADS, head_dim)
    k, v = (normal(g, 3, capacity, GROUPS, head_dim) for _ in "kv")
    lengths = int32(capacity, tokens, max(tokens, capacity - 13))
    for b, length in enumerate(lengths.tolist()):
        k[b, length:], v[b, length:] = float("nan"), float("nan")
    lead = {"none": (), "shared": (), "bank": (ADAPTERS,)}[form]
    prompt_k, prompt_v = (normal(g, *lead, ROWS, GROUPS, head_dim) for _ in "kv")
    prompts = {"prompt_k": prompt_k, "prompt_v": prompt_v, "gate": 1.5 * normal(g, *lead, HEADS)}
    if form == "bank":
        prompts |= {"adapter_index": int32(2, -1, 0), "prompt_lengths": int32(ROWS, 3, 5, 1)}
    found = Cache(q, k, v, lengths, {} if form == "none" else prompts)
    return found.cast(torch.float32)


def paged(cache: Cache, page: int) -> Cache:
    """The same cache in pages that lie in disorder, among others that hold NaN."""
    b, capacity, *inner = cache.k_cache.shape
    width = -(-capacity // page)
    g = torch.Generator().manual_seed(page)
    table = torch.randperm(b * width + 3, generator=g)[: b * width].view(b, width)
    pools = []
    for x in (cache.k_cache, cache.v_cache):
        pool = torch.full((b * width + 3, page, *inner), float("nan"), dtype=torch.float32)
        filled = torch.full((b, width * page, *inner), float("nan"), dtype=torch.float32)
        filled[:, :capacity] = x.float().cpu()
        pool[table.flatten()] = filled.view(b * width, page, *inner)
        pools.append(pool.to(x))
    table = table.int()
    for row, length in enumerate(cache.cache_lengths.tolist()):
        # entries past a sequence's end are never followed
        table[row, -(-length // page) :] = 10**6
    table = table.to(cache.q.device)
    return replace(cache, k_cache=pools[0], v_cache=pools[1], page_table=table)


def check_pages_are_the_cache() -> None:
    """A paged cache gives the bits of a contiguous one, and a chunk over pages those of packed."""
    cache = make_cache(3)
    expected = cache.call()
    for page in (1, 16, 32):
        pages = paged(cache, page)
        check_bitwise(f"pages of {page}", pages.call(), expected)
        check_identity("chunk", chunk_over_pages(pages), expected.flatten(0, 1))


def chunk_over_pages(pages: Cache) -> Tensor:
    """The same new tokens through the packed function, as a chunk of a prompt takes it."""
    assert pages.page_table is not None
    b, tokens = pages.q.shape[:2]
    cu_q = torch.arange(b + 1, dtype=torch.int32, device=pages.q.device) * tokens
    cu_k = torch.nn.functional.pad(pages.cache_lengths.cumsum(0, dtype=torch.int32), (1, 0))
    with torch.no_grad():
        out = zero_init_attention_varlen(
            pages.q.flatten(0, 1), pages.k_cache, pages.v_cache, **pages.prompts,
            cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=tokens,
            max_seqlen_k=int(pages.cache_lengths.max()), page_table=pages.page_table,
            backend=cases.BACKEND,
        )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def check_decode_is_a_prefill_row() -> None:
    """The newest tokens of every sequence are the last rows of attention over all its tokens."""
    # two splits of the size that ships
    cache = make_cache(3, capacity=300)
    got = cache.call()
    for b, length in enumerate(cache.cache_lengths.tolist()):
        one = cache.rows(b)
        with torch.no_grad():
            out = zero_init_attention(
                one.q, one.k_cache[:, :length], one.v_cache[:, :length], **one.prompts,
                backend=cases.BACKEND,
            )  # fmt: skip
        assert isinstance(out, Tensor)
        check_identity(f"sequence {b}", got[b : b + 1], out)
