"""Is native.cpp right, does it leave the rest to others, and does compiling it survive?"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adapter_kernels import (
    linear,
    native,
    rms_norm,
    swiglu,
    write_cache,
    zero_init_attention_decode,
)
from adapter_kernels.backend import INTERPRETED
from tests.adapter_kernels.small_ops import Spy, angles, assert_equal, draw
from tests.adapter_kernels.tolerances import (
    check_as_accurate_as_eager,
    check_bitwise,
    check_identity,
)
from tests.adapter_kernels.zero_init_attention import cases
from tests.adapter_kernels.zero_init_attention.cases import int32, normal
from tests.adapter_kernels.zero_init_attention.decode_runs import (
    Cache,
    make_cache,
    operation,
    paged,
)

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="kernels come first in the interpreter"),
    pytest.mark.usefixtures("native_way"),
]
EPS = 1e-5
Call = Callable[[], object]


@pytest.fixture(autouse=True)
def by_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "BACKEND", "native")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads, and one again afterwards."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


def taken(call: Call) -> bool:
    """Whether a public call is native.cpp's: none of the package's or torch's operations runs."""
    with torch.profiler.profile() as profile:
        call()
    names = {event.key for event in profile.key_averages()}
    general = {f"adapter_kernels::{name}" for name in ("decode", "attention")}
    return bool({n for n in names if n.startswith("adapter_kernels::")} - general) and not any(
        n.startswith("aten::") and n not in ("aten::empty", "aten::resize_") for n in names
    )


# ------------------------------------------------------------------------------- small operations


@pytest.mark.parametrize("shape", [(1, 1), (5, 13, 257), (3, 96), (2, 31)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    x, weight, residual = draw(*shape, grad=False), draw(shape[-1], grad=False), torch.randn(shape)

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight

    assert taken(lambda: rms_norm(x, weight, eps=EPS, residual=residual))
    out, h = rms_norm(x, weight, eps=EPS, residual=residual)
    assert torch.equal(h, x + residual)
    # the sum is inside or outside
    assert torch.equal(out, rms_norm(h, weight, eps=EPS))
    truth = formula(h.double(), weight.double())
    check_as_accurate_as_eager("out", out, formula(h, weight), truth)


@pytest.mark.parametrize("shape", [(1, 1), (3, 131), (2, 5, 48)])
def test_swiglu(shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    gate, up = 30 * torch.randn(shape), torch.randn(shape)

    def formula(gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate) * up

    assert taken(lambda: swiglu(gate, up))
    check_as_accurate_as_eager(
        "out", swiglu(gate, up), formula(gate, up), formula(gate.double(), up.double())
    )
    far = torch.tensor([-1e4, -88.0, 0.0, 88.0, 1e4, float("inf")])
    expected = functional.silu(far) * torch.ones(6)
    torch.testing.assert_close(swiglu(far, torch.ones(6)), expected)


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize(("width", "outputs"), [(96, 40), (37, 11), (5, 3), (257, 8), (64, 1)])
def test_linear(rows: int, width: int, outputs: int) -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(1, rows, width), torch.randn(outputs, width)
    assert taken(lambda: linear(x, weight))
    out = linear(x, weight)
    check_as_accurate_as_eager(
        "out", out, functional.linear(x, weight), functional.linear(x.double(), weight.double())
    )
    for row in range(rows):
        check_bitwise(f"row {row} alone", linear(x[:, row : row + 1], weight)[0, 0], out[0, row])
    # a weight whose rows do not follow one another
    wide = torch.randn(outputs, width + 3)
    check_bitwise("strided", linear(x, wide[:, :width]), linear(x, wide[:, :width].contiguous()))


@pytest.mark.parametrize("page", [None, 3])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("batched", [False, True])
def test_write_cache(
    page: int | None, index: torch.dtype, batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the general way, in caches and in pages, rotated and, to the bit, as they are."""
    torch.manual_seed(4)
    k, v, q = (torch.randn(2, 3, heads, 6) for heads in (2, 2, 8))
    cos, sin = angles(*((2, 3, 3) if batched else (3, 3)))
    positions = torch.tensor([[4, 0, 2], [1, 3, -1]], dtype=index)
    table = None if page is None else torch.tensor([[2, 4], [0, 1]], dtype=torch.int32)
    shape = (2, 5, 2, 6) if page is None else (5, page, 2, 6)
    given: dict[str, Any] = {"positions": positions, "page_table": table}

    def written() -> tuple[Tensor, ...]:
        caches = [torch.full(shape, 7.0) for _ in range(4)]
        versions = [cache._version for cache in caches]
        write_cache(k, v, *caches[:2], **given)
        out = write_cache(k, v, *caches[2:], **given, cos=cos, sin=sin, q=q)
        assert all(new._version > old for new, old in zip(caches, versions, strict=True))
        return (*caches, out)

    zeros = torch.zeros(shape), torch.zeros(shape)
    assert taken(lambda: write_cache(k, v, *zeros, **given))
    got = written()
    monkeypatch.setattr(native, "write_cache", native.takes_nothing)
    expected = written()
    assert_equal(got[:2], expected[:2])
    for name, one, other in zip(("k_cache", "v_cache", "q"), got[2:], expected[2:], strict=True):
        check_identity(name, one, other)
        assert torch.equal(one == 7, other == 7)
    assert not torch.equal(got[0], got[2])


def test_write_cache_through_views() -> None:
    store, heads = torch.zeros(2, 4, 9, 2, 6), torch.randn(2, 1, 5, 2, 6)
    k, v = heads[:, :, 1], heads[:, :, 3]
    caches = store[0, 1:3, :5], store[1, 1:3, 2:7]
    assert native.write_cache(k, v, *caches, torch.tensor([[4], [0]]), *[None] * 4) is not None
    expected = torch.zeros_like(store)
    expected[0, 1, 4], expected[0, 2, 0] = k[0, 0], k[1, 0]
    expected[1, 1, 6], expected[1, 2, 2] = v[0, 0], v[1, 0]
    assert torch.equal(store, expected)


# --------------------------------------------------------------------------------------- attention


def check(cache: Cache) -> None:
    truth = operation(cache.cast(torch.float64), "reference")
    check_as_accurate_as_eager("out", cache.call(), operation(cache, "reference"), truth)


@pytest.mark.parametrize("form", ["none", "shared", "bank"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("page", [None, 1, 16, 100])
def test_forms_and_new_tokens(form: str, tokens: int, page: int | None) -> None:
    # beyond a block of keys, and not a multiple of one
    cache = make_cache(tokens, form=form, capacity=197)
    check(cache if page is None else paged(cache, page))


@pytest.mark.parametrize("head_dim", [8, 24, 80, 128, 256])
def test_head_widths(head_dim: int) -> None:
    check(make_cache(2, head_dim=head_dim))


def test_prompts_per_sample_with_gates_of_either_form() -> None:
    cache, g = make_cache(3, form="none"), torch.Generator().manual_seed(2)
    # more rows than a block
    k, v = (normal(g, 3, 71, 2, 16).float() for _ in "kv")
    for gate in (1.5 * normal(g, 6).float(), 1.5 * normal(g, 3, 6).float()):
        check(replace(cache, prompts={"prompt_k": k, "prompt_v": v, "gate": gate}))


def test_far_scores() -> None:
    """Hundreds apart, where a softmax that is not shifted would overflow."""
    cache = make_cache(2, capacity=150)
    check(replace(cache, q=300 * cache.q))


@pytest.mark.parametrize("scale", [0.3, -0.7, 2])
def test_scales(scale: float) -> None:
    cache = make_cache(2)
    other = replace(cache, q=cache.q * (scale * 4.0))
    check_identity("scale", cache.call(backend=None, scale=scale), other.call())


def test_infinity_and_nan_spread_as_in_the_reference() -> None:
    for bad in (float("nan"), float("inf")):
        for name in ("q", "k_cache", "v_cache"):
            cache = make_cache(1, form="shared")
            changed = getattr(cache, name).clone()
            changed[0, 0, 0, 3] = bad
            cache = replace(cache, **{name: changed})
            got, expected = cache.call(), operation(cache, "reference")
            assert torch.equal(got.isfinite(), expected.isfinite()), (bad, name)
            assert not got.isfinite().all()


def test_a_block_whose_scores_are_all_minus_infinity_weighs_nothing() -> None:
    cache = make_cache(1, form="none", capacity=197)
    k = cache.k_cache.clone()
    k[:, :130] = float("-inf")
    q = torch.ones_like(cache.q)
    got = replace(cache, q=q, k_cache=k).rows(0).call()
    rest = replace(cache, q=q, k_cache=cache.k_cache[:, 130:], v_cache=cache.v_cache[:, 130:])
    check_identity("the rest", got, replace(rest, cache_lengths=int32(67, 1, 1)).rows(0).call())


def test_pages_are_the_cache() -> None:
    cache = make_cache(3)
    for page in (64, 128):
        check_bitwise(f"pages of {page}", paged(cache, page).call(), cache.call())
    check_identity("pages of 16", paged(cache, 16).call(), cache.call())


def test_decode_is_a_prefill_row(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(3, capacity=300)
    got = cache.call()
    monkeypatch.setattr(cases, "BACKEND", "reference")
    check_identity("rows", got, cache.call())


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_sequence_depends_on_neither_batch_nor_threads(
    tokens: int, page: int | None, threads: Callable[[int], None]
) -> None:
    cache = make_cache(tokens)
    cache = cache if page is None else paged(cache, page)
    together = cache.call()
    threads(2)
    check_bitwise("threads", cache.call(), together)
    for b in range(3):
        check_bitwise(f"sequence {b}", cache.rows(b).call(), together[b : b + 1])


def test_an_empty_slot_is_zero_whatever_its_prompt_holds() -> None:
    cache = make_cache(2)
    bad = {"prompt_k": torch.full_like(cache.prompts["prompt_k"], float("nan"))}
    empty = replace(cache, cache_lengths=int32(70, 0, 0))
    assert empty.call()[1:].count_nonzero() == 0
    # sequence 1 has no adapter, sequence 2 no tokens
    assert replace(empty, prompts=cache.prompts | bad).call()[1:].count_nonzero() == 0


def test_no_adapter_no_rows_and_no_gate_are_bitwise_plain() -> None:
    cache = make_cache(2)
    plain = replace(cache, prompts={}).call()
    check_bitwise("sequence 1 has index -1", cache.call()[1], plain[1])
    silent = cache.prompts | {"gate": torch.zeros_like(cache.prompts["gate"])}
    check_bitwise("gate 0", replace(cache, prompts=silent).call(), plain)
    empty = cache.prompts | {"prompt_lengths": int32(0, 0, 0, 0)}
    check_bitwise("no rows", replace(cache, prompts=empty).call(), plain)


# --------------------------------------------------------------------------- what is left to others


def decode_arguments() -> dict[str, Any]:
    cache = paged(make_cache(2), 16)
    return {
        "q": cache.q, "k_cache": cache.k_cache, "v_cache": cache.v_cache, **cache.prompts,
        "cache_lengths": cache.cache_lengths, "page_table": cache.page_table,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", 3, "q must be a tensor, got int"),
        ("cache_lengths", int32(70, 2, 200), "cache_lengths must be from 0 to 80, got 200"),
        ("cache_lengths", int32(70, -1, 9), "cache_lengths must be from 0 to 80, got -1"),
        ("cache_lengths", int32(70, 1, 9), "cache_lengths must be 0 or count the T = 2 new tokens"),
        ("cache_lengths", int32(70, 2), "cache_lengths must have shape (B,) = (3,), got (2,)"),
        ("page_table", int32(*range(15)).view(3, 5) + 9, "page_table must be from 0 to 17, got 19"),
        ("adapter_index", int32(4, 0, 0), "adapter_index must be from -1 to 3, got 4"),
        ("adapter_index", int32(-2, 0, 0), "adapter_index must be from -1 to 3, got -2"),
        ("prompt_lengths", int32(9, 9, 10, 9), "prompt_lengths must be from 0 to 9, got 10"),
        ("gate", torch.ones(6), "gate must have shape (A, H) = (4, 6), got (6,)"),
        ("prompt_v", None, "prompt_k, prompt_v and gate must be given together"),
        ("scale", float("nan"), "scale must be a finite number, got nan"),
        ("scale", 1e-40, "scale must be 0 or of a magnitude from 1e-30 to 1e+30, got 1e-40"),
    ],
)
def test_wrong_arguments_are_named_as_ever(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        zero_init_attention_decode(**decode_arguments() | {name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.tensor([[0, 5]])}, "positions must be from -1 to 4, got 5"),
        ({"positions": torch.tensor([[0, -2]])}, "positions must be from -1 to 4, got -2"),
        ({"page_table": int32(0, 3).view(1, 2), "positions": torch.tensor([[0, 7]])},
         "page_table must be from 0 to 0 where a position needs it, got 3"),
        ({"k_cache": torch.zeros(1, 1, 2, 6).expand(1, 5, 2, 6)}, "must have memory for every"),
        ({"v": torch.ones(1, 2, 2, 6).requires_grad_()}, "must not require a gradient"),
    ],
)  # fmt: skip
def test_wrong_writes_write_nothing(change: dict[str, Any], message: str) -> None:
    k, caches = torch.ones(1, 2, 2, 6), torch.zeros(2, 1, 5, 2, 6)
    given = {"k": k, "v": k, "k_cache": caches[0], "v_cache": caches[1]}
    given |= {"positions": torch.tensor([[0, 1]])}
    with pytest.raises(ValueError, match=re.escape(message)):
        write_cache(**given | change)
    assert caches.count_nonzero() == 0


def test_a_gradient_goes_the_general_way() -> None:
    x, weight = draw(2, 9), draw(9)
    rms_norm(x, weight, eps=EPS).sum().backward()
    swiglu(x, draw(2, 9)).sum().backward()
    linear(x, draw(4, 9)).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    cache = make_cache()
    out = zero_init_attention_decode(
        cache.q.requires_grad_(), cache.k_cache, cache.v_cache, cache_lengths=cache.cache_lengths
    )
    with pytest.raises(RuntimeError, match="forward only"):
        out.sum().backward()
    with torch.no_grad():
        assert taken(lambda: rms_norm(x, weight, eps=EPS))


def test_modes_and_transforms_see_the_operations() -> None:
    x, weight, up = (torch.randn(2, 9) for _ in range(3))
    with Spy() as spy:
        swiglu(x, up)
    assert [name for name, *_ in spy.calls] == ["swiglu"]
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match=r"torch.vmap over swiglu"):
        torch.vmap(swiglu)(x, up)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(swiglu, (x, up), (x, up))
    with torch._subclasses.FakeTensorMode() as mode:
        assert linear(mode.from_tensor(x), mode.from_tensor(weight)).shape == (2, 2)
    assert linear(x.to("meta"), weight.to("meta")).is_meta


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_does_not_break_at_it(backend: str) -> None:
    cache = paged(make_cache(2), 16)
    x, weight = torch.randn(3, 16), torch.randn(16)

    def step(x: Tensor, weight: Tensor) -> Tensor:
        out = cache.call(backend=None)
        gate = rms_norm(x, weight, eps=EPS)
        return swiglu(gate, linear(x, weight * x)[:, :1].repeat(1, 16)) + out.sum()

    expected = step(x, weight)
    got = torch.compile(step, fullgraph=True, backend=backend)(x, weight)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_the_general_way(dtype: torch.dtype) -> None:
    cache = make_cache(2).cast(dtype)
    check_identity("out", cache.call(backend=None), cache.call(backend="hybrid"))
    with pytest.raises(ValueError, match="'native' is not available for zero_init_attention_dec"):
        cache.call()


def test_traced_code_keeps_the_operations() -> None:
    x, up = torch.randn(2, 9), torch.randn(2, 9)
    traced = torch.jit.trace(lambda x: swiglu(x, up), (x,))
    other = torch.randn(2, 9)
    torch.testing.assert_close(traced(other), functional.silu(other) * up)


def test_classes_of_their_own_are_kept() -> None:
    class Own(Tensor):
        """A tensor with a class of its own."""

    x, weight = torch.randn(2, 9).as_subclass(Own), torch.randn(3, 9)
    assert type(linear(x, weight)) is Own
    assert type(swiglu(x, x)) is Own
    assert type(linear(x.as_subclass(Tensor), torch.nn.Parameter(weight).detach())) is Tensor


def test_sources_inside_the_cache_are_left_to_torch() -> None:
    k_cache, v_cache = torch.randn(2, 1, 9, 2, 6)
    rest = [torch.tensor([[3, 4]]), *[None] * 4]
    k, v = k_cache[:, 2:4], torch.randn(1, 2, 2, 6)
    assert native.write_cache(k, v, k_cache, v_cache, *rest) is None
    assert native.write_cache(v, k, v_cache, k_cache, *rest) is None
    both = torch.randn(1, 20, 2, 6)
    assert native.write_cache(v, v, both[:, :16], both[:, 1:17], *rest) is None
    assert native.write_cache(v, v, k_cache, v_cache, *rest) is not None


def test_memory_that_is_shorter_than_the_tensor_is_left_to_torch() -> None:
    weight = torch.randn(32, 64)
    weight.untyped_storage().resize_(64)
    assert native.linear(torch.randn(2, 64), weight) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cos": torch.randn(4), "sin": torch.randn(4)}, "cos must have shape (T, D/2)"),
        ({"k": torch.tensor(1.0)}, "k must have shape (B, T, G, D), got ()"),
    ],
)
def test_arguments_without_dimensions_are_named(change: dict[str, Any], message: str) -> None:
    k, caches = torch.ones(1, 2, 2, 6), torch.zeros(2, 1, 5, 2, 6)
    given = {"k": k, "v": k, "k_cache": caches[0], "v_cache": caches[1]}
    given |= {"positions": torch.tensor([[0, 1]])}
    with pytest.raises(ValueError, match=re.escape(message)):
        write_cache(**given | change)
    scalar = {"prompt_k": torch.tensor(1.0), "prompt_v": torch.tensor(1.0)}
    with pytest.raises(ValueError, match="prompt_k must have shape"):
        zero_init_attention_decode(**decode_arguments() | scalar)


def test_memory_of_inference_is_not_written_outside_of_it() -> None:
    with torch.inference_mode():
        caches = torch.zeros(2, 1, 5, 2, 6)
    k = torch.ones(1, 1, 2, 6)
    assert native.write_cache(k, k, *caches, torch.tensor([[2]]), *[None] * 4) is None
    with torch.inference_mode():
        write_cache(k, k, *caches, positions=torch.tensor([[2]]))
    assert caches.count_nonzero() == 24


# --------------------------------------------------------------------------------------- compiling


def compiling(folder: Path, code: str = "", **variables: str) -> subprocess.Popen[str]:
    """A process that compiles into `folder` and prints whether it succeeded."""
    program = f"from adapter_kernels import native\nprint(native.load())\n{code}"
    path = os.pathsep.join(p for p in sys.path if p)
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(folder), "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, "-c", program], env=environment | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "reason"),
    [({"CXX": "false"}, "Command"), ({"CXX": "/no/g++ -m64"}, "there is no C++ compiler '/no/g")],
)
def test_without_a_compiler_a_warning_says_so(
    tmp_path: Path, variables: dict[str, str], reason: str
) -> None:
    code = "import torch; from adapter_kernels import swiglu; print(swiglu(*torch.ones(2, 3)))"
    out, errors = compiling(tmp_path, code, **variables).communicate(timeout=120)
    assert out.split("\n")[:2] == ["False", "tensor([0.7311, 0.7311, 0.7311])"]
    assert f"native.cpp, which cannot be compiled: {reason}" in errors
    assert not list(tmp_path.rglob("*.so"))


def test_a_damaged_file_is_compiled_anew_and_a_failure_is_not_repeated(tmp_path: Path) -> None:
    code = "native.library().parent.mkdir(); native.library().write_bytes(b'')\n"
    code += "native._failed = False; print(native.load(), native.load())"
    out, errors = compiling(tmp_path, code, CXX="/no/g++").communicate(timeout=120)
    assert out == "False\nFalse False\n"
    assert errors.count("there is no C++ compiler") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="torch's threads are OpenMP's")
def test_torchs_own_threads_share_large_work(threads: Callable[[int], None]) -> None:
    torch.manual_seed(5)
    x, weight = torch.randn(3, 1024), torch.randn(700, 1024)
    cache = make_cache(2, capacity=900, head_dim=64)
    alone = linear(x, weight), cache.call()
    threads(2)
    check_bitwise("linear", linear(x, weight), alone[0])
    check_bitwise("decode", cache.call(), alone[1])
    assert b"GOMP_parallel" in native.library().read_bytes()
    # it is torch's runtime of threads; other packages bring some of their own in a .libs folder
    maps = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    found = [path for path in maps if "libgomp" in path and ".libs/" not in path]
    assert [Path(path).parent for path in found] == [Path(torch.__path__[0], "lib").resolve()]


@pytest.mark.slow
def test_two_at_once_after_one_that_was_killed(tmp_path: Path) -> None:
    killed = compiling(tmp_path)
    while not list(tmp_path.rglob("*.ninja")):
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not list((tmp_path / native.NAME).glob("*.so"))
    both = [compiling(tmp_path) for _ in range(2)]
    for process in both:
        out, errors = process.communicate(timeout=300)
        assert (process.returncode, out) == (0, "True\n"), errors
    assert len(list((tmp_path / native.NAME).glob("*.so"))) == 1
