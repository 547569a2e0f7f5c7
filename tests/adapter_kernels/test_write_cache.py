"""write_cache slot by slot, in caches and in pages; the rotation inside is apply_rotary's."""

import importlib
import re

import pytest
import torch
from torch import Tensor

from adapter_kernels import apply_rotary, write_cache
from tests.adapter_kernels.small_ops import DTYPES, angles, assert_equal, draw

OPS = torch.ops.adapter_kernels


def pages_of(cache: Tensor, table: Tensor) -> Tensor:
    """The sequences (B, max_pages * page, G, D) that a page table describes."""
    return cache[table.long()].flatten(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_writes_the_addressed_slots_and_nothing_else(
    dtype: torch.dtype, index: torch.dtype
) -> None:
    torch.manual_seed(3)
    k, v = draw(3, 4, 2, 6, dtype=dtype, grad=False), draw(3, 4, 2, 6, dtype=dtype, grad=False)
    positions = torch.tensor([[0, 1, 2, 3], [6, -1, 2, 0], [-1, -1, -1, -1]], dtype=index)
    caches = [draw(3, 7, 2, 6, dtype=dtype, grad=False) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    for b in range(3):
        for t in range(4):
            if positions[b, t] >= 0:
                expected[0][b, positions[b, t]] = k[b, t]
                expected[1][b, positions[b, t]] = v[b, t]
    assert write_cache(k, v, *caches, positions=positions) is None
    assert_equal(tuple(caches), tuple(expected))


def test_pages_hold_what_a_contiguous_cache_holds() -> None:
    torch.manual_seed(4)
    k, v = draw(3, 5, 2, 6, grad=False), draw(3, 5, 2, 6, grad=False)
    cos, sin = angles(3, 5, 3)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, -1, 11, 3], [-1, 2, 0, -1, 5]])
    # 4 pages of 3 slots for each sequence, scattered; -1 and 99 are pages that no position needs
    table = torch.tensor([[9, 2, -1, 99], [4, 0, 7, 12], [1, 3, -1, 99]], dtype=torch.int32)
    pages = [torch.full((13, 3, 2, 6), 7.0) for _ in range(2)]
    plain = [torch.full((3, 12, 2, 6), 7.0) for _ in range(2)]
    write_cache(k, v, *pages, positions=positions, page_table=table, cos=cos, sin=sin)
    write_cache(k, v, *plain, positions=positions, cos=cos, sin=sin)
    reachable = table.clamp(min=-1)
    reachable[(table == 99) | (table == -1)] = 5
    for paged, contiguous in zip(pages, plain, strict=True):
        assert torch.equal(pages_of(paged, reachable), contiguous)
        untouched = [n for n in range(13) if n not in (9, 2, 4, 0, 7, 12, 1, 3)]
        assert torch.equal(paged[untouched], torch.full((5, 3, 2, 6), 7.0))
    assert int((plain[0] != 7).any(-1).any(-1).sum()) == 12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batched", [False, True])
def test_rotation_inside_is_apply_rotary(dtype: torch.dtype, batched: bool) -> None:
    k, v = draw(2, 3, 2, 6, dtype=dtype, grad=False), draw(2, 3, 2, 6, dtype=dtype, grad=False)
    cos, sin = angles(*((2, 3, 3) if batched else (3, 3)))
    positions = torch.tensor([[4, 0, 2], [1, 3, -1]])
    inside, outside = ([torch.zeros(2, 5, 2, 6, dtype=dtype) for _ in range(2)] for _ in range(2))
    kept = k.clone()
    assert write_cache(k, v, *inside, positions=positions, cos=cos, sin=sin) is None
    _, rotated = apply_rotary(k, k, cos, sin, interleaved=True)
    write_cache(rotated, v, *outside, positions=positions)
    assert_equal(tuple(inside), tuple(outside))
    assert torch.equal(inside[0][1, 1], rotated[1, 0])
    assert not torch.equal(inside[0][1, 1], k[1, 0])
    # queries with heads of their own, turned on the way
    q, kept_q = draw(2, 3, 8, 6, dtype=dtype, grad=False), [x.zero_() for x in outside]
    found = write_cache(k, v, *kept_q, positions=positions, cos=cos, sin=sin, q=q)
    assert torch.equal(found, apply_rotary(q, k, cos, sin, interleaved=True)[0])
    assert_equal(tuple(kept_q), tuple(inside))
    assert torch.equal(k, kept)


def test_writes_through_views_of_a_larger_cache() -> None:
    store = torch.zeros(2, 4, 9, 2, 6)
    k, v = draw(2, 1, 2, 6, grad=False), draw(2, 1, 2, 6, grad=False)
    version = store._version
    write_cache(k, v, store[0, 1:3, :5], store[1, 1:3, 2:7], positions=torch.tensor([[4], [0]]))
    expected = torch.zeros_like(store)
    expected[0, 1, 4], expected[0, 2, 0] = k[0, 0], k[1, 0]
    expected[1, 1, 6], expected[1, 2, 2] = v[0, 0], v[1, 0]
    assert torch.equal(store, expected)
    # autograd notices that the cache has changed
    assert store._version > version


@pytest.mark.parametrize(("batch", "tokens", "slots"), [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
@pytest.mark.parametrize("paged", [False, True])
def test_write_of_nothing(batch: int, tokens: int, slots: int, paged: bool) -> None:
    k = draw(batch, tokens, 2, 6, grad=False)
    positions = torch.full((batch, tokens), -1)
    shape = (3, 1, 2, 6) if paged else (batch, slots, 2, 6)
    caches = [draw(*shape, grad=False) for _ in range(2)]
    before = tuple(cache.clone() for cache in caches)
    table = torch.zeros(batch, slots, dtype=torch.int32) if paged else None
    write_cache(k, k, *caches, positions=positions, page_table=table)
    assert_equal(tuple(caches), before)


def test_out_of_range_is_skipped_where_values_are_not_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module("adapter_kernels.write_cache")
    for check in ("check_range", "check_values"):
        monkeypatch.setattr(module, check, lambda *_: None)
    k = torch.ones(1, 4, 1, 2)
    plain, pages = torch.zeros(1, 3, 1, 2), torch.zeros(2, 3, 1, 2)
    write_cache(k, k, plain, plain.clone(), positions=torch.tensor([[3, -7, 1, 2**40]]))
    assert plain[0, :, 0, 0].tolist() == [0, 1, 0]
    positions, table = torch.tensor([[0, 4, 8, 99]]), torch.tensor([[2, 1, -1]]).int()
    write_cache(k, k, pages, pages.clone(), positions=positions, page_table=table)
    assert pages[:, :, 0, 0].tolist() == [[0, 0, 0], [0, 1, 0]]


def test_write_cache_opcheck_and_compile() -> None:
    k, v = draw(2, 3, 2, 6, grad=False), draw(2, 3, 2, 6, grad=False)
    positions, (cos, sin) = torch.tensor([[0, 1, 4], [-1, -1, 2]]), angles(3, 3)
    caches = (torch.zeros(2, 5, 2, 6), torch.zeros(2, 5, 2, 6))
    table = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
    q = draw(2, 3, 4, 6, grad=False)
    for rest in ((None, cos, sin, q), (None, cos, sin, None), (table, None, None, None)):
        torch.library.opcheck(OPS.write_cache.default, (k, v, *caches, positions, *rest))

    def step(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        write_cache(k, v, k_cache, v_cache, positions=positions, cos=cos, sin=sin)
        return k_cache.sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        fresh = (torch.zeros(2, 5, 2, 6), torch.zeros(2, 5, 2, 6))
        results.append((function(k, v, *fresh), *fresh))
    assert_equal(*results)
    assert results[0][0] != 0


def cache_arguments() -> dict:
    k, cache = torch.ones(2, 3, 2, 6), torch.zeros(2, 5, 2, 6)
    positions = torch.tensor([[0, 1, 2], [3, 4, -1]])
    return {"k": k, "v": k, "k_cache": cache, "v_cache": cache.clone(), "positions": positions}


PAGES = torch.zeros(2, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 1}, "k must be a tensor, got int"),
        ({"k": torch.ones(2, 3, 6)}, "k must have shape (B, T, G, D), got (2, 3, 6)"),
        ({"k": torch.ones(2, 3, 2, 6).long()}, "k must be float16 or bfloat16 or float32, got int"),
        ({"v": torch.ones(2, 3, 2, 4)}, "v must have shape that of k = (2, 3, 2, 6), got"),
        ({"v": torch.ones(2, 3, 2, 6).half()}, "v must be float32, got float16"),
        (
            {"v": torch.ones(2, 3, 2, 6, device="meta")},
            "v must be on the device of k, cpu, got meta",
        ),
        (
            {"k_cache": torch.ones(3, 5, 2, 6)},
            "k_cache must have shape (B, S_max, G, D) = (2, S_max, 2, 6), got (3, 5, 2, 6)",
        ),
        (
            {"k_cache": torch.ones(3, 5, 2, 4), "page_table": PAGES},
            "k_cache must have shape (N, page, G, D) = (N, page, 2, 6), got (3, 5, 2, 4)",
        ),
        ({"k_cache": torch.ones(2, 5, 2, 6).half()}, "k_cache must be float32, got float16"),
        (
            {"v_cache": torch.ones(2, 4, 2, 6)},
            "v_cache must have shape that of k_cache = (2, 5, 2, 6), got (2, 4, 2, 6)",
        ),
        (
            {"k": torch.ones(2, 3, 2, 6).requires_grad_()},
            "k, v, q, cos, sin and the caches must not require a gradient",
        ),
        (
            {"v_cache": torch.zeros(2, 5, 2, 6).requires_grad_()},
            "k, v, q, cos, sin and the caches must not require a gradient",
        ),
        (
            {"k_cache": torch.zeros(1, 5, 2, 6).expand(2, 5, 2, 6)},
            "k_cache must have memory for every slot, got an expanded tensor",
        ),
        (
            {"positions": torch.zeros(3).long()},
            "positions must have shape (B, T) = (2, 3), got (3,)",
        ),
        ({"positions": torch.zeros(2, 3)}, "positions must be int32 or int64, got float32"),
        (
            {"positions": torch.zeros(2, 3, device="meta").long()},
            "positions must be on the device of k, cpu, got meta",
        ),
        (
            {"page_table": PAGES[0]},
            "page_table must have shape (B, max_pages) = (2, max_pages), got (3,)",
        ),
        ({"page_table": PAGES.long()}, "page_table must be int32, got int64"),
        (
            {"page_table": PAGES.to("meta")},
            "page_table must be on the device of k, cpu, got meta",
        ),
        ({"cos": torch.ones(3, 3)}, "cos and sin must both be given or both be None"),
        (
            {"q": torch.ones(2, 3, 4, 6)},
            "cos and sin must be given with q, which is only rotated, got None",
        ),
        (
            {"q": torch.ones(2, 3, 4, 8)},
            "q must have shape (B, T, H, D) = (2, 3, H, 6), got (2, 3, 4, 8)",
        ),
        ({"q": torch.ones(2, 3, 4, 6).half()}, "q must be float32, got float16"),
        (
            {"cos": torch.ones(3, 3), "sin": torch.ones(2, 3)},
            "sin must have shape (T, D/2) = (3, 3) or (B, T, D/2) = (2, 3, 3), got (2, 3)",
        ),
        (
            {"positions": torch.tensor([[0, 5, 1], [2, 3, -1]])},
            "positions must be from -1 to 4, got 5",
        ),
        (
            {"positions": torch.tensor([[0, -2, 1], [2, 3, -1]])},
            "positions must be from -1 to 4, got -2",
        ),
        (
            {"positions": torch.tensor([[0, 15, 1], [2, 3, -1]]), "page_table": PAGES},
            "positions must be from -1 to 14, got 15",
        ),
        (
            {"page_table": torch.tensor([[1, 0, 0], [2, 9, 9]]).int()},
            "page_table must be from 0 to 1 where a position needs it, got 2",
        ),
    ],
)
def test_cache_errors_name_the_argument_and_write_nothing(change: dict, message: str) -> None:
    arguments = cache_arguments() | change
    before = [arguments[name].clone() for name in ("k_cache", "v_cache")]
    with pytest.raises(ValueError, match=re.escape(message)):
        write_cache(**arguments)
    assert_equal((arguments["k_cache"], arguments["v_cache"]), tuple(before))


def test_a_pool_seen_as_one_row_of_slots() -> None:
    """As an engine writes: every token a slot of its own, in any order, or none."""
    k, v = draw(1, 4, 2, 6, grad=False), draw(1, 4, 2, 6, grad=False)
    pages = [torch.full((3, 5, 2, 6), 7.0) for _ in range(2)]
    rows = [x.view(1, 15, 2, 6) for x in pages]
    write_cache(k, v, *rows, positions=torch.tensor([[14, 0, 6, 2]], dtype=torch.int32))
    for held, new in zip(rows, (k, v), strict=True):
        assert torch.equal(held[0, [14, 0, 6, 2]], new[0])
        assert int((held != 7).flatten(2).any(-1).sum()) == 4
    write_cache(v, k, *rows, positions=torch.tensor([[-1, 1, -1, 6]], dtype=torch.int32))
    assert torch.equal(rows[0][0, [14, 0, 1, 6]], torch.stack((k[0, 0], k[0, 1], v[0, 1], v[0, 3])))
    with pytest.raises(ValueError, match="positions must be from -1 to 14, got 15"):
        write_cache(k, v, *rows, positions=torch.tensor([[15, 1, 2, 3]]))


def test_asks_for_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    module = importlib.import_module("adapter_kernels.write_cache")
    monkeypatch.setattr(module, "choose_backend", lambda *args: asked.append(args[:4]))
    write_cache(**cache_arguments())
    assert asked == [("write_cache", None, torch.device("cpu"), ("reference",))]
