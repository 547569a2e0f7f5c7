"""Decoding by the library of a CPU: right, the same bits in any batch or page, and chosen there."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adapter_kernels import gated_prompt_attention, zero_init_attention_varlen
from adapter_kernels.backend import INTERPRETED
from adapter_kernels.zero_init_attention import hybrid_launch
from adapter_kernels.zero_init_attention.dispatch import cached_backends
from adapter_kernels.zero_init_attention.layouts import Prompts
from tests.adapter_kernels.tolerances import (
    check_as_accurate_as_eager,
    check_bitwise,
    check_identity,
)
from tests.adapter_kernels.zero_init_attention import cases, decode_runs
from tests.adapter_kernels.zero_init_attention.cases import int32, normal
from tests.adapter_kernels.zero_init_attention.decode_runs import (
    Cache,
    make_cache,
    operation,
    paged,
)

FLOAT32 = torch.float32
DTYPES = [FLOAT32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "BACKEND", "hybrid")


def check(cache: Cache, dtype: torch.dtype) -> None:
    cache = cache.cast(dtype)
    truth = operation(cache.cast(torch.float64), "reference")
    check_as_accurate_as_eager("out", cache.call(), operation(cache, "reference"), truth)


@pytest.mark.parametrize("form", ["none", "shared", "bank"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forms_and_new_tokens(form: str, tokens: int, dtype: torch.dtype) -> None:
    check(make_cache(tokens, form=form), dtype)


@pytest.mark.parametrize("page", [1, 16, 64])
def test_pages_in_disorder(page: int) -> None:
    check(paged(make_cache(4), page), FLOAT32)


@pytest.mark.parametrize("head_dim", [8, 24, 80, 128, 256])
def test_head_widths(head_dim: int) -> None:
    check(make_cache(2, head_dim=head_dim), FLOAT32)


def test_prompts_per_sample_with_gates_of_either_form() -> None:
    cache, g = make_cache(3, form="none"), torch.Generator().manual_seed(2)
    k, v = (normal(g, 3, 7, 2, 16).float() for _ in "kv")
    for gate in (1.5 * normal(g, 6).float(), 1.5 * normal(g, 3, 6).float()):
        prompts = {"prompt_k": k, "prompt_v": v, "gate": gate}
        check(replace(cache, prompts=prompts), FLOAT32)


def test_pages_are_the_cache() -> None:
    """In disorder, and in order, where they are read without a copy."""
    cache = make_cache(3)
    expected = cache.call()
    for page in (1, 16, 32):
        check_bitwise(f"pages of {page}", paged(cache, page).call(), expected)
    pools = [x.view(3 * 7, 10, 2, 16) for x in (cache.k_cache, cache.v_cache)]
    table = torch.arange(21, dtype=torch.int32).view(3, 7)
    in_order = replace(cache, k_cache=pools[0], v_cache=pools[1], page_table=table)
    check_bitwise("pages in order", in_order.call(), expected)
    # the first and the last where they would be in order, the others not
    swapped = [x.clone() for x in pools]
    for x in swapped:
        x[[1, 2]] = x[[2, 1]]
    table = table.clone()
    table[0, [1, 2]] = table[0, [2, 1]]
    nearly = replace(cache, k_cache=swapped[0], v_cache=swapped[1], page_table=table)
    check_bitwise("pages nearly in order", nearly.call(), expected)


@pytest.mark.parametrize("page", [1, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_over_pages(dtype: torch.dtype, page: int) -> None:
    """Packed new tokens over a paged cache, and a sequence that has nothing yet."""
    cache = make_cache(23).cast(dtype)
    got = decode_runs.chunk_over_pages(paged(cache, page))
    truth = operation(cache.cast(torch.float64), "reference").flatten(0, 1)
    eager = operation(cache, "reference").flatten(0, 1)
    check_as_accurate_as_eager("out", got, eager, truth)


def test_a_chunk_whose_sequences_are_empty() -> None:
    cache = paged(make_cache(2), 16)
    arguments = {"max_seqlen_q": 2, "max_seqlen_k": 70, "page_table": cache.page_table}
    with torch.no_grad():
        out = zero_init_attention_varlen(
            cache.q[:2].flatten(0, 1), cache.k_cache, cache.v_cache, **cache.prompts, **arguments,
            cu_seqlens_q=int32(0, 2, 2, 4), cu_seqlens_k=int32(0, 70, 70, 70), backend="hybrid",
        )  # fmt: skip
    assert isinstance(out, Tensor)
    # no keys: the prompt's part alone
    alone = gated_prompt_attention(
        cache.q[1:2], *(cache.prompts[n] for n in ("prompt_k", "prompt_v", "gate")),
        adapter_index=cache.prompts["adapter_index"][2:],
        prompt_lengths=cache.prompts["prompt_lengths"],
    )  # fmt: skip
    check_identity("without keys", out[2:], alone[0])


def test_decode_is_a_prefill_row() -> None:
    decode_runs.check_decode_is_a_prefill_row()


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_sequence_does_not_depend_on_its_batch(tokens: int, page: int | None) -> None:
    cache = make_cache(tokens)
    cache = cache if page is None else paged(cache, page)
    together = cache.call()
    for b in range(3):
        check_bitwise(f"sequence {b}", cache.rows(b).call(), together[b : b + 1])


def test_an_empty_slot_is_zero_whatever_its_prompt_holds() -> None:
    cache = make_cache(2)
    empty = replace(cache, cache_lengths=int32(70, 0, 0)).call()
    assert empty[1:].count_nonzero() == 0
    check_bitwise("the other", empty[0], cache.call()[0])


def test_no_adapter_and_no_gate_are_bitwise_plain() -> None:
    cache = make_cache(2)
    plain = replace(cache, prompts={}).call()
    check_bitwise("sequence 1 has index -1", cache.call()[1], plain[1])
    silent = cache.prompts | {"gate": torch.zeros_like(cache.prompts["gate"])}
    check_bitwise("gate 0", replace(cache, prompts=silent).call(), plain)


@pytest.mark.skipif(INTERPRETED, reason="kernels come first in the interpreter")
def test_a_cpu_takes_the_library_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Prompts] = []
    decode = hybrid_launch.decode

    def counted(q: Tensor, k: Tensor, v: Tensor, prompts: Prompts, *rest: object) -> Tensor:
        calls.append(prompts)
        return decode(q, k, v, prompts, *rest)

    monkeypatch.setattr(hybrid_launch, "decode", counted)
    cache = make_cache()
    cache.call(backend=None)
    assert len(calls) == 1
    cache.call(backend=None, scale=-0.5)
    assert len(calls) == 1
    q = cache.q
    assert cached_backends(q, 1.0, False) == ("hybrid", "reference")
    assert cached_backends(q, 0.0, False) == cached_backends(q, 1.0, True) == ("reference",)
    with pytest.raises(ValueError, match="'hybrid' is not available for zero_init_attention_dec"):
        cache.call(scale=-1.0)
