"""Does decoding from a cache, in chunks of any length, give what one whole forward call gives?"""

import random
import re

import pytest
import torch
from torch import Tensor

from adapter_kernels import write_cache
from llama_adapter.adapter import Adapter, Prompts
from llama_adapter.cache import (
    PAGE_SIZE,
    KVCache,
    PagePool,
    PoolFull,
    decode_span,
    packed_span,
    pages_for,
)
from llama_adapter.config import LlamaConfig
from llama_adapter.model import Llama

LENGTH = 83


def random_tokens(config: LlamaConfig, batch: int, count: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, config.vocab_size, (batch, count), generator=generator)


def project(model: Llama, adapter: Adapter | None) -> Prompts | None:
    return None if adapter is None else model.project(adapter)


def in_chunks(model: Llama, tokens: Tensor, size: int, prompts: Prompts | None) -> Tensor:
    cache = KVCache(model.config, len(tokens), tokens.shape[1])
    logits = [model(chunk, prompts, cache=cache) for chunk in tokens.split(size, 1)]
    assert cache.lengths.tolist() == [tokens.shape[1]] * len(tokens)
    return torch.cat(logits, 1)


# one prefill, chunks on either side of the 16 tokens that decoding takes, and a token at a time
@pytest.mark.parametrize("size", [1, 5, 16, 17, 40, LENGTH])
@pytest.mark.parametrize("adapted", [True, False], ids=["prompts", "base"])
@torch.no_grad()
def test_chunks_equal_one_forward_call(
    size: int, adapted: bool, tiny_model: Llama, tiny_adapter: Adapter, tiny_config: LlamaConfig
) -> None:
    tokens = random_tokens(tiny_config, 2)
    prompts = project(tiny_model, tiny_adapter if adapted else None)
    expected = tiny_model(tokens, prompts)
    assert expected.std() > 0.5
    got = in_chunks(tiny_model, tokens, size, prompts)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefill", [16, 40], ids=["decoding kernel", "packed kernel"])
@torch.no_grad()
def test_unequal_lengths_equal_one_by_one(
    prefill: int, tiny_model: Llama, tiny_adapter: Adapter, tiny_config: LlamaConfig
) -> None:
    prompts = tiny_model.project(tiny_adapter)
    tokens = random_tokens(tiny_config, 4)
    lengths = [prefill, 1, prefill // 2 + 1, prefill - 3]
    cache = KVCache(tiny_config, 4, LENGTH)
    padded = tokens[:, :prefill].clone()
    for row, length in enumerate(lengths):
        # anything may stand in the padding
        padded[row, length:] = 7
    first = tiny_model(padded, prompts, cache=cache, new_lengths=lengths)
    steps = [first[row, : lengths[row]] for row in range(4)]
    assert cache.lengths.tolist() == lengths
    # a second chunk, again unequal, one sequence pausing; then single tokens
    for counts, width in (([5, 9, 0, 2], 9), ([1, 1, 1, 1], 1), ([1, 1, 1, 1], 1)):
        starts = cache.lengths.tolist()
        chunk = torch.stack(
            [tokens[row, start : start + width] for row, start in enumerate(starts)]
        )
        logits = tiny_model(chunk, prompts, cache=cache, new_lengths=counts)
        steps = [torch.cat((step, logits[row, : counts[row]])) for row, step in enumerate(steps)]
    for row, step in enumerate(steps):
        alone = tiny_model(tokens[row : row + 1, : len(step)], prompts)[0]
        torch.testing.assert_close(step, alone, rtol=0, atol=1e-5)
    assert cache.lengths.tolist() == [len(step) for step in steps]


@torch.no_grad()
def test_a_full_cache_is_used_to_its_last_token(
    tiny_model: Llama, tiny_adapter: Adapter, tiny_config: LlamaConfig
) -> None:
    prompts = tiny_model.project(tiny_adapter)
    tokens = random_tokens(tiny_config, 1, PAGE_SIZE)
    cache = KVCache(tiny_config, 1, PAGE_SIZE)
    tiny_model(tokens[:, :-1], prompts, cache=cache)
    last = tiny_model(tokens[:, -1:], prompts, cache=cache)
    torch.testing.assert_close(last, tiny_model(tokens, prompts)[:, -1:], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="capacity must be at least 65 tokens for 1 more, got 64"):
        tiny_model(tokens[:, :1], prompts, cache=cache)
    assert cache.lengths.tolist() == [PAGE_SIZE]


def test_room_is_counted_per_sequence(tiny_config: LlamaConfig) -> None:
    """The longest sequence was once taken for the sum of the longest chunks: 120 tokens here."""
    cache = KVCache(tiny_config, 2, PAGE_SIZE)
    cache.advance([60, 3])
    cache.advance([0, 60])
    cache.span(1)
    with pytest.raises(ValueError, match="capacity must be at least 65 tokens for 2 more, got 64"):
        cache.span(2)


@torch.no_grad()
def test_half_precision_cache_holds_rotated_keys(tiny_config: LlamaConfig) -> None:
    model = Llama(tiny_config).to(torch.bfloat16)
    cache = KVCache(tiny_config, 2, 9, dtype=torch.bfloat16)
    tokens = random_tokens(tiny_config, 2, 9)
    got = model(tokens, cache=cache)
    assert cache.k.dtype == torch.bfloat16
    assert cache.k[:, :, 9:].count_nonzero() == 0
    assert torch.all(cache.k[:, :, :9].float().norm(dim=-1) > 0)
    torch.testing.assert_close(got, model(tokens), rtol=0.02, atol=0.01)


@pytest.mark.parametrize(("asked", "capacity"), [(1, 64), (64, 64), (65, 128), (200, 256)])
def test_capacity_is_whole_pages(asked: int, capacity: int, tiny_config: LlamaConfig) -> None:
    cache = KVCache(tiny_config, 3, asked)
    assert cache.capacity == capacity
    assert cache.k.shape == cache.v.shape == (4, 3, capacity, 2, 8)
    assert cache.page_table.flatten().tolist() == list(range(3 * capacity // PAGE_SIZE))


def test_pages_are_the_same_memory(tiny_config: LlamaConfig) -> None:
    cache = KVCache(tiny_config, 2, 100)
    k_pages, v_pages = cache.pool.layer(3)
    k_pages[cache.page_table[1, 1], 5] = 4.0
    v_pages[cache.page_table[0, 1], 6] = 5.0
    assert cache.k.sum() == 4.0 * 2 * 8
    assert torch.all(cache.k[3, 1, PAGE_SIZE + 5] == 4.0)
    assert cache.v.sum() == 5.0 * 2 * 8
    assert torch.all(cache.v[3, 0, PAGE_SIZE + 6] == 5.0)


def test_span_describes_the_next_tokens(tiny_config: LlamaConfig) -> None:
    cache = KVCache(tiny_config, 3, 64)
    cache.advance([4, 0, 11])
    span = cache.span(2)
    assert span.positions.tolist() == [[4, 5], [0, 1], [11, 12]]
    assert span.cache_lengths.tolist() == [6, 2, 13]
    assert span.slots.tolist() == [[4, 5, 64, 65, 139, 140]]
    # the decoding kernel takes so few
    assert span.cu_seqlens_q is span.cu_seqlens_k is None
    span = cache.span(20)
    assert span.cu_seqlens_q is not None
    assert span.cu_seqlens_k is not None
    assert span.cu_seqlens_q.tolist() == [0, 20, 40, 60]
    assert span.cu_seqlens_k.tolist() == [0, 24, 44, 75]
    assert (span.longest_q, span.longest_k) == (20, 31)
    indices = (span.positions, span.slots, span.cu_seqlens_q, span.cu_seqlens_k, span.page_table)
    assert {x.dtype for x in indices} == {torch.int32}
    assert cache.lengths.tolist() == [4, 0, 11]


@pytest.mark.parametrize(
    ("batch", "capacity", "message"),
    [(0, 8, "batch must be at least 1, got 0"), (2, 0, "capacity must be at least 1, got 0")],
)
def test_empty_caches_are_refused(
    batch: int, capacity: int, message: str, tiny_config: LlamaConfig
) -> None:
    with pytest.raises(ValueError, match=message):
        KVCache(tiny_config, batch, capacity)


def test_counts_of_another_batch_are_refused(tiny_config: LlamaConfig) -> None:
    cache = KVCache(tiny_config, 3, 8)
    with pytest.raises(ValueError, match="counts must have 3 entries, got 2"):
        cache.advance([1, 1])
    cache.advance([5, 0, 64])
    cache.advance([-2, 0, 0])
    for counts in ([-4, 0, 0], [0, 0, 1]):
        with pytest.raises(ValueError, match="counts must leave every sequence 0 to 64 tokens, go"):
            cache.advance(counts)
    assert cache.lengths.tolist() == [3, 0, 64]
    cache.advance([-3, 0, -64])
    assert cache.lengths.tolist() == [0, 0, 0]


def test_pages_are_handed_out_once(tiny_config: LlamaConfig) -> None:
    pool = PagePool(tiny_config, 5)
    first = pool.take(3)
    assert (first, pool.free) == ([0, 1, 2], 2)
    with pytest.raises(PoolFull, match="count must be at most the pool's 2 free pages, got 3"):
        pool.take(3)
    assert pool.free == 2
    pool.give_back([1])
    for pages, message in (
        ([0, 1], "pages must be taken ones, got 1, which is free"),
        ([0, 0], re.escape("pages must differ, got [0, 0]")),
        ([9], "pages must be taken ones, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            pool.give_back(pages)
    assert pool.free == 3
    assert sorted(pool.take(3)) == [1, 3, 4]
    with pytest.raises(ValueError, match="size must be at least 1 page, got 0"):
        PagePool(tiny_config, 0)


@pytest.mark.parametrize("seed", range(5))
def test_sequences_that_come_and_go_keep_what_is_theirs(
    seed: int, tiny_config: LlamaConfig
) -> None:
    """Against a dictionary of lists: appended to in chunks, ended, begun in freed pages."""
    rng = random.Random(seed)
    pool = PagePool(tiny_config, 9)
    pages: dict[int, list[int]] = {}
    written: dict[int, list[float]] = {}
    shape, stamp, refused = (tiny_config.kv_heads, tiny_config.head_dim), 0, 0
    for step in range(200):
        if pages and rng.random() < 0.25:
            ended = rng.choice(list(pages))
            pool.give_back(pages.pop(ended))
            del written[ended]
        chosen = rng.sample([*pages, step], rng.randint(1, len(pages) + 1))
        counts = []
        for name in list(chosen):
            new = rng.choice([1, 1, 5, 64, 130])
            missing = pages_for(len(written.get(name, [])) + new) - len(pages.get(name, []))
            try:
                taken = pool.take(missing) if missing else []
            except PoolFull:
                refused += 1
                chosen.remove(name)
                continue
            pages[name] = [*pages.get(name, []), *taken]
            written.setdefault(name, [])
            counts.append(new)
        if not chosen:
            continue
        starts = [len(written[name]) for name in chosen]
        tables = [pages[name] for name in chosen]
        span = packed_span(starts, counts, tables, torch.device("cpu"))
        values = torch.arange(stamp, stamp + sum(counts)).float()
        stamp += sum(counts)
        stored = values[None, :, None, None].expand(1, -1, *shape)
        for layer in range(tiny_config.n_layers):
            k, v = (x.view(1, -1, *shape) for x in pool.layer(layer))
            write_cache(stored + layer, stored - layer, k, v, positions=span.slots)
        for name, part in zip(chosen, values.split(counts), strict=True):
            written[name] += part.tolist()
        for name, expected in written.items():
            for layer in (0, tiny_config.n_layers - 1):
                k, v = (x[pages[name]].flatten(0, 1)[: len(expected)] for x in pool.layer(layer))
                assert (k - layer)[:, 0, 0].tolist() == expected
                assert (v + layer)[:, -1, -1].tolist() == expected
        assert pool.free + sum(map(len, pages.values())) == pool.size
    assert refused > 10
    for name in list(pages):
        pool.give_back(pages.pop(name))
    assert pool.free == pool.size


def test_the_newest_tokens_of_sequences_in_pages() -> None:
    """An empty slot has no place, and what lies past a length in the table is not followed."""
    table = torch.tensor([[7, 3, 10**6], [2, -5, 10**6], [9, 9, 9]], dtype=torch.int32)
    span = decode_span(torch.tensor([65, 64, 0], dtype=torch.int32), table)
    assert span.positions.tolist() == [[64], [63], [0]]
    assert span.slots.tolist() == [[3 * 64, 2 * 64 + 63, -1]]
    assert span.cu_seqlens_q is None
