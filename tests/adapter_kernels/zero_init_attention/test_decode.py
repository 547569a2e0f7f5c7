"""Is decoding right? Every form, dtype and page size against float64, and what is bitwise."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from adapter_kernels import launch
from adapter_kernels.backend import INTERPRETED
from tests.adapter_kernels.tolerances import (
    check_as_accurate_as_eager,
    check_bitwise,
    check_identity,
    largest,
)
from tests.adapter_kernels.zero_init_attention import cases, decode_runs
from tests.adapter_kernels.zero_init_attention.decode_runs import (
    Cache,
    chunk_over_pages,
    make_cache,
    operation,
    paged,
)
from tests.adapter_kernels.zero_init_attention.kernel_runs import (
    DEVICE,
    DTYPES,
    launched,
    needs_kernels,
)

pytest.importorskip("triton")

from adapter_kernels.zero_init_attention import decode  # needs triton

pytestmark = [pytest.mark.kernel, needs_kernels]
FLOAT32 = torch.float32
FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of 64 keys, so that short caches have two of them."""
    monkeypatch.setattr(cases, "BACKEND", "triton")
    monkeypatch.setattr(cases, "DEVICE", DEVICE)
    monkeypatch.setattr(decode, "SPLIT", 64)


def check(cache: Cache, dtype: torch.dtype) -> None:
    """By the policy: the truth is the reference in float64, the baseline the same in the dtype."""
    cache = cache.cast(dtype)
    results = [operation(one, name) for one, name in (
        (cache, "triton"), (cache, "reference"), (cache.cast(torch.float64), "reference")
    )]  # fmt: skip
    check_as_accurate_as_eager("out", *results)


@pytest.mark.parametrize("form", ["none", "shared", "bank"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("dtype", dict.fromkeys((FLOAT32, *DTYPES)))
def test_forms_and_new_tokens(form: str, tokens: int, dtype: torch.dtype) -> None:
    before = Counter(launch.counts)
    check(make_cache(tokens, form=form), dtype)
    assert launched(before) == {"decode_kernel": 1, "combine_kernel": 1}


@pytest.mark.parametrize("capacity", [1, 16, 63, 64, 65, 127, 200])
def test_capacities_around_splits(capacity: int) -> None:
    before = Counter(launch.counts)
    check(make_cache(capacity=capacity, form="shared"), FLOAT32)
    assert ("combine_kernel" in launched(before)) == (capacity > 64)


@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 80, 96, 128, 256])
def test_head_widths(head_dim: int) -> None:
    check(make_cache(2, head_dim=head_dim), DTYPES[0])


@pytest.mark.parametrize("page", [1, 16, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_page_sizes(page: int, dtype: torch.dtype) -> None:
    check(paged(make_cache(4), page), dtype)


@pytest.mark.parametrize("rows", [1, 16, 17, 65, 300])
def test_prompt_lengths(rows: int) -> None:
    cache = make_cache(2, form="shared")
    g = torch.Generator().manual_seed(rows)
    k, v = (cases.normal(g, rows, 2, 16) for _ in "kv")
    check(replace(cache, prompts=cache.prompts | {"prompt_k": k, "prompt_v": v}), DTYPES[1])


def test_many_query_heads_of_one_key_head_take_several_tiles() -> None:
    cache = make_cache(13, form="none")
    g = torch.Generator().manual_seed(1)
    cache = replace(cache, q=cases.normal(g, 3, 13, 24, 16))
    check(cache, FLOAT32)


def test_pages_are_the_cache() -> None:
    decode_runs.check_pages_are_the_cache()


def test_decode_is_a_prefill_row() -> None:
    decode_runs.check_decode_is_a_prefill_row()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_over_pages(dtype: torch.dtype) -> None:
    """More than 16 tokens go through the packed function, which reads the same pages."""
    cache = make_cache(23).cast(dtype)
    got = chunk_over_pages(paged(cache, 16))
    truth = operation(cache.cast(torch.float64), "reference").flatten(0, 1)
    check_as_accurate_as_eager("out", got, operation(cache, "reference").flatten(0, 1), truth)


@pytest.mark.parametrize("page", [None, 16])
def test_a_sequence_does_not_depend_on_its_batch_or_its_cache(page: int | None) -> None:
    """Bitwise: alone, in a batch, in a cache of one split or of many."""
    cache = make_cache(3, capacity=60)
    cache = cache if page is None else paged(cache, page)
    together = cache.call()
    for b in range(3):
        check_bitwise(f"sequence {b}", cache.rows(b).call(), together[b : b + 1])
    if page is None:
        room = [torch.full((3, 200, 2, 16), float("nan"), device=DEVICE) for _ in "kv"]
        for x, y in zip(room, (cache.k_cache, cache.v_cache), strict=True):
            x[:, :60] = y
        check_bitwise(
            "more room", replace(cache, k_cache=room[0], v_cache=room[1]).call(), together
        )


def test_gate_zero_is_bitwise_plain_attention() -> None:
    cache = make_cache(3)
    zero = cache.prompts | {"gate": torch.zeros_like(cache.prompts["gate"])}
    expected = replace(cache, prompts={}).call()
    check_bitwise("out", replace(cache, prompts=zero).call(), expected)
    check_bitwise("no adapter", cache.call()[1], expected[1])


def test_repeats_are_bitwise() -> None:
    cache = make_cache(5)
    first = cache.call()
    for _ in range(3):
        check_bitwise("out", cache.call(), first)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 2.5])
def test_scales(scale: float) -> None:
    cache = make_cache(2)
    expected = cache.call(scale=scale, backend="reference")
    check_identity("out", cache.call(scale=scale), expected)


def test_lengths_that_no_host_checked_are_clamped() -> None:
    """As a GPU gets them: beyond the cache, negative, and shorter than the new tokens."""
    cache = make_cache(3)
    cache = replace(cache, k_cache=cache.k_cache.nan_to_num(), v_cache=cache.v_cache.nan_to_num())
    found = {}
    for name, lengths in (("odd", (999, -4, 2)), ("clamped", (70, 0, 2))):
        lengths = cases.int32(*lengths)
        found[name] = operation(replace(cache, cache_lengths=lengths), "triton")
    check_bitwise("out", found["odd"], found["clamped"])
    assert not found["odd"][1].any()
    # of three tokens the first is none, as the sequence has two
    assert not found["odd"][2, 0].any()
    assert largest(found["odd"][2, 1]) > 0


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cache_of_eight_bits(page: int | None, dtype: torch.dtype) -> None:
    """Against the same rounded cache in float64; scales per head, unequal, no powers of 2."""
    cache = make_cache(3)
    g = torch.Generator().manual_seed(4)
    scales = [cases.normal(g, 2).exp().float() for _ in "kv"]
    narrow = [
        (x / scale[:, None]).nan_to_num().to(FP8)
        for x, scale in zip((cache.k_cache, cache.v_cache), scales, strict=True)
    ]
    cache = replace(cache.cast(dtype), k_cache=narrow[0], v_cache=narrow[1])
    cache = cache if page is None else paged(cache, page)
    got = cache.call(k_scale=scales[0], v_scale=scales[1])
    wide = replace(
        cache.cast(torch.float64),
        k_cache=cache.k_cache.double() * scales[0][:, None],
        v_cache=cache.v_cache.double() * scales[1][:, None],
    )
    eager = operation(wide.cast(dtype), "reference")
    check_as_accurate_as_eager("out", got, eager, operation(wide, "reference"))
    check_identity("reference", cache.call(
        k_scale=scales[0], v_scale=scales[1], backend="reference"
    ), got)  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="no graphs in the interpreter")
@pytest.mark.gpu
def test_a_captured_step_follows_lengths_pages_and_adapters() -> None:
    cache = paged(make_cache(1).cast(torch.bfloat16), 16)
    cache.call()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = cache.call()
    assert cache.page_table is not None
    for lengths, index in (((70, 1, 57), (2, -1, 0)), ((33, 70, 1), (-1, 3, 1))):
        cache.cache_lengths.copy_(cases.int32(*lengths))
        cache.prompts["adapter_index"].copy_(cases.int32(*index))
        cache.page_table.copy_(cache.page_table.roll(1, 0))
        cache.page_table.clamp_(max=cache.k_cache.shape[0] - 1)
        cache.k_cache.nan_to_num_()
        cache.v_cache.nan_to_num_()
        graph.replay()
        check_bitwise("replayed", out.clone(), cache.call())
