"""Are the kernels right? Every form, layout and dtype against float64, and the identities.

Tiles of the interpreter are those of sm_80: sequences of a few rows and of several tiles occur.
"""

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module, invalidate_caches
from pathlib import Path

import pytest
import torch

from adapter_kernels import launch
from adapter_kernels.zero_init_attention import (
    backward_prompt,
    configs,
    kernel_arguments,
    library,
    triton_launch,
)
from tests.adapter_kernels.tolerances import check_bitwise
from tests.adapter_kernels.zero_init_attention import cases, checkers, decode_runs
from tests.adapter_kernels.zero_init_attention.cases import (
    FORMS,
    LAYOUTS,
    make_case,
    normal,
    sized,
)
from tests.adapter_kernels.zero_init_attention.kernel_runs import (
    DEVICE,
    DTYPES,
    check_against_reference,
    launched,
    needs_kernels,
    on_device,
)

pytestmark = [pytest.mark.kernel, needs_kernels]
FLOAT32 = torch.float32
FOLDER = Path(library.__file__).parent


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "BACKEND", "triton")
    monkeypatch.setattr(cases, "DEVICE", DEVICE)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 rows and 16 keys, so that short sequences have many of them."""
    monkeypatch.setattr(triton_launch, "tile", lambda *_: configs.TileConfig(16, 16, 4, 1))


@pytest.mark.parametrize(
    ("form", "layout", "dtype"),
    [
        (form, layout, dtype)
        for dtype in DTYPES
        for form in (FORMS if dtype == DTYPES[0] else ("shared", "bank_lengths"))
        for layout in (LAYOUTS if dtype == DTYPES[0] else ("causal", "packed"))
    ],
)
def test_every_form_and_layout(form: str, layout: str, dtype: torch.dtype) -> None:
    before = Counter(launch.counts)
    check_against_reference(on_device(make_case(form, layout), dtype), "triton")
    ran = launched(before)
    assert {"forward_kernel", "query_kernel", "key_kernel"} <= set(ran)
    prefixed = layout == "packed_prefix"
    assert ("prompt_backward_kernel" in ran) == (form != "none")
    assert ("prefix_kernel" in ran) == prefixed
    assert ("sum_kernel" in ran) == (form != "none" or prefixed)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (16, 16), (17, 33), (31, 32), (33, 17), (48, 47), (1, 65)]
)
def test_lengths_around_the_tiles(queries: int, keys: int) -> None:
    for causal in (True, False):
        case = sized("shared", queries=queries, keys=keys, head_dim=8, rows=10, causal=causal)
        check_against_reference(on_device(case, FLOAT32), "triton")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", ["padded", "packed", "packed_bidirectional"])
def test_padding_and_packing_across_tiles(layout: str) -> None:
    g = torch.Generator().manual_seed(8)
    case = make_case("bank_lengths", layout)
    if layout == "padded":
        starts, ends = cases.int32(0, 17, 30), cases.int32(45, 38, 30)
        q, k, v = normal(g, 3, 37, 6, 8), *(normal(g, 3, 45, 2, 8) for _ in "kv")
        case = replace(case, q=q, k=k, v=v, key_starts=starts, key_lengths=ends)
    else:
        q, k, v = normal(g, 70, 6, 8), *(normal(g, 81, 2, 8) for _ in "kv")
        cu_q, cu_k = cases.int32(0, 33, 33, 70), cases.int32(0, 20, 48, 81)
        case = replace(case, q=q, k=k, v=v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    check_against_reference(on_device(case, FLOAT32), "triton")


@pytest.mark.parametrize("head_dim", [8, 16, 24, 40, 64, 80, 96, 128, 256])
def test_head_widths(head_dim: int) -> None:
    case = sized("shared", queries=9, keys=13, head_dim=head_dim, rows=5)
    check_against_reference(on_device(case, DTYPES[0]), "triton")


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 64, 65, 128, 144, 224, 300])
@pytest.mark.parametrize("form", ["shared", "bank_lengths"])
def test_prompt_lengths(rows: int, form: str) -> None:
    case = sized(form, queries=5, keys=9, head_dim=16, rows=rows)
    check_against_reference(on_device(case, DTYPES[1]), "triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_lie_at_odd_places(dtype: torch.dtype) -> None:
    """Slices with odd strides and offsets: no row begins where a kernel may load 16 bytes."""

    def shifted(x: torch.Tensor) -> torch.Tensor:
        room = x.new_empty(*x.shape[:-1], x.shape[-1] + 3)
        room[..., 1:-2] = x.detach()
        return room[..., 1:-2].requires_grad_()

    case = on_device(sized("sample", queries=9, keys=13, head_dim=16, rows=5), dtype)
    leaves = {name: shifted(x) for name, x in case.leaves.items() if name != "gate"}
    check_against_reference(replace(case, **leaves), "triton")


@pytest.mark.parametrize("scale", [-0.7, 0.0, 2.5])
def test_scales(scale: float) -> None:
    case = replace(make_case("shared", "causal"), scale=scale)
    check_against_reference(on_device(case, FLOAT32), "triton")


def test_more_query_rows_than_one_prompt_program_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward_prompt, "PROMPT_ROWS", 128)
    case = sized("sample", queries=300, keys=40, head_dim=8, rows=6, causal=False)
    check_against_reference(on_device(case, FLOAT32), "triton")


@pytest.mark.parametrize("large", ["k", "prompt_k", "prompt_v"])
@pytest.mark.parametrize("dtype", [FLOAT32, torch.float16])
def test_one_segment_may_dwarf_the_other(large: str, dtype: torch.dtype) -> None:
    case = make_case("shared", "causal")
    factor = 100 if large == "prompt_v" else 20
    case = replace(case, **{large: getattr(case, large) * factor})
    check_against_reference(on_device(case, dtype), "triton")


@pytest.mark.parametrize("layout", ["causal", "blind", "packed"])
@pytest.mark.parametrize("form", FORMS[1:])
def test_gate_zero_is_bitwise_plain_attention(form: str, layout: str) -> None:
    checkers.check_gate_zero_is_plain_attention(form, layout)


@pytest.mark.parametrize("form", ["shared", "bank"])
def test_output_is_linear_in_the_gate(form: str) -> None:
    checkers.check_linear_in_the_gate(form, "packed")


def test_prompt_rows_have_no_order() -> None:
    checkers.check_prompt_rows_may_be_permuted("sample_gates", "padded")


@pytest.mark.parametrize("form", ["shared", "bank_lengths"])
def test_dgate_is_dout_times_prompt_out(form: str) -> None:
    checkers.check_dgate_is_dout_times_prompt_out(form, "causal")


@pytest.mark.parametrize("layout", ["causal", "padded", "blind"])
def test_a_sequence_does_not_depend_on_its_batch(layout: str) -> None:
    checkers.check_batch_of_one("bank_lengths", layout)


def test_adapter_index_is_read_at_every_call() -> None:
    checkers.check_index_is_read_at_every_call()


def test_rows_two_to_the_31_elements_apart() -> None:
    """Offsets of 32 bits would wrap around and read or write elsewhere."""
    # rows stay aligned: others would be copied to where they are near
    step = (2**31 // 6 // 8 + 1) * 8
    case = sized("shared", queries=7, keys=7, head_dim=8, rows=3)
    small = on_device(case, DTYPES[1])
    try:
        # memory that nobody touches costs nothing on a CPU
        wide = torch.zeros(7 * step, dtype=small.q.dtype, device=small.q.device)
    except RuntimeError:
        pytest.skip(f"needs {14 * step >> 30} GiB for one tensor")
    one = {name: getattr(small, name).detach()[:1] for name in "qkv"}
    far, place = {}, 0
    for name, x in (*one.items(), ("dout", torch.randn_like(one["q"]))):
        far[name] = wide.as_strided(x.shape, (7 * step, step, 8, 1), place)
        far[name].copy_(x)
        place += x.shape[2] * 8
        assert kernel_arguments.aligned_rows(far[name]) is far[name]
    dout = far.pop("dout")
    results = []
    for leaves, given in ((one, dout.contiguous()), (far, dout)):
        moved = replace(small, **leaves).cast(small.q.dtype) if leaves is one else None
        if moved is None:
            # a cast would copy
            grown = {name: x.requires_grad_() for name, x in leaves.items()}
            moved = replace(replace(small, **one).cast(small.q.dtype), **grown)
        out, lse = moved.public()
        results.append([out, lse, *torch.autograd.grad(out, list(moved.leaves.values()), given)])
    for name, near, apart in zip(("out", "lse", *small.leaves), *results, strict=True):
        check_bitwise(name, apart, near)


def test_a_diverged_adapter_spoils_no_row_without_one() -> None:
    """Row 0 of a bank stands in for what is absent; nothing of it may show, NaN least of all."""
    case = on_device(make_case("bank_lengths", "causal"), FLOAT32)
    index, lengths = cases.int32(-1, 2, 9), cases.int32(0, 3, 2, 0)
    expected = replace(case, adapter_index=index, prompt_lengths=lengths)
    gate = case.leaves["gate"].detach().clone()
    gate[0] = float("nan")
    spoilt = replace(expected, gate=gate.requires_grad_())
    found = []
    for one in (expected, spoilt):
        out, lse = prompt_of_raw_index(one)
        leaves = list(one.leaves.values())
        found.append([out, lse, *torch.autograd.grad(out.sum(), leaves, allow_unused=True)])
    for name, one, other in zip(("out", "lse", *case.leaves), *found, strict=True):
        check_bitwise(name, other, one)


def prompt_of_raw_index(case: cases.Case) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse below the checks, as a GPU runs with an index that no host looked at."""
    rest = (*[None] * 9, 0, 0, True, case.scale, "triton")
    out, lse, _ = library.attention_op(case.q, case.k, case.v, *case.prompts, *rest)
    return out, lse


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_index_tensors_need_not_be_contiguous(layout: str) -> None:
    case = on_device(make_case("bank_lengths", layout), FLOAT32)
    names = ("adapter_index", "prompt_lengths", "key_starts", "key_lengths", "cu_seqlens_q",
             "cu_seqlens_k")  # fmt: skip
    given = {name: x for name in names if (x := getattr(case, name)) is not None}
    assert len(given) == 4
    strided = {name: x.repeat_interleave(2)[::2] for name, x in given.items()}
    check_against_reference(replace(case, **strided), "triton")
    one = case.q.new_full((1,), 2, dtype=torch.int32)
    same = replace(case, adapter_index=one.expand(3))
    expected = replace(case, adapter_index=one.repeat(3)).public()
    check_bitwise("expanded", same.public()[0], expected[0])


@pytest.mark.parametrize("rows", [5, 40, 70])
def test_small_gates_keep_their_gradients_in_half_precision(rows: int) -> None:
    """Gates grow from 0: in float16 a probability times 3e-5 is subnormal, a sum of them is not."""
    case = sized("sample", queries=200, keys=13, head_dim=16, rows=rows)
    gate = case.leaves["gate"].detach() * 3e-5
    check_against_reference(on_device(replace(case, gate=gate), DTYPES[1]), "triton")


# planted mutation: what is substituted in which file, and the checks that must notice it
Check = Callable[[], None]
MUTATIONS: dict[str, tuple[str, str, str, list[Check]]] = {
    "gate dropped": (
        "forward",
        "factor = gate / unit / tl.where(row_sum > 0, row_sum, 1.0)",
        "factor = 1.0 / tl.where(row_sum > 0, row_sum, 1.0)",
        [lambda: checkers.check_gate_zero_is_plain_attention("shared", "causal")],
    ),
    "sign of delta": (
        "backward_dkv",
        "ds = p * (dp - delta[None, :])",
        "ds = p * (dp + delta[None, :])",
        [lambda: check("none", "bidirectional"), lambda: check("bank", "packed")],
    ),
    "sign of the prompt's delta": (
        "backward_dq",
        "delta -= gate * delta_p",
        "delta += gate * delta_p",
        [lambda: check("sample_gates", "causal")],
    ),
    "wrong diagonal": (
        "tiles",
        "seen = seen & (offs_n[None, :] <= offs_m[:, None] + offset)",
        "seen = seen & (offs_n[None, :] < offs_m[:, None] + offset)",
        [lambda: check("none", "causal"), lambda: check("shared", "packed")],
    ),
    "wrong group head": (
        "forward",
        "    k_start, S = sequence(cu_k_ptr, b, S)\n    g = h // GROUP\n",
        "    k_start, S = sequence(cu_k_ptr, b, S)\n    g = h % (H // GROUP)\n",
        [lambda: check("none", "causal"), lambda: check("shared", "packed")],
    ),
    "prompt mask ignored": (
        "tiles",
        "length = tl.minimum(length, tl.load(lengths_ptr + row))",
        "length = length + 0",
        [lambda: check("bank_lengths", "causal")],
    ),
    "page off by one": (
        "tiles",
        "page = tl.load(table_ptr + keys // PAGE, mask=inside, other=0)",
        "page = tl.load(table_ptr + (keys + 1) // PAGE, mask=inside, other=0)",
        [decode_runs.check_pages_are_the_cache],
    ),
    "last split dropped": (
        "decode",
        "for split in tl.range(0, (length + KEYS - 1) // KEYS):",
        "for split in tl.range(0, length // KEYS):",
        [decode_runs.check_decode_is_a_prefill_row],
    ),
    "stale index": (
        "tiles",
        "row = tl.load(index_ptr + b)",
        "row = tl.load(index_ptr)",
        [checkers.check_index_is_read_at_every_call],
    ),
}


def check(form: str, layout: str) -> None:
    check_against_reference(on_device(make_case(form, layout), FLOAT32), "triton")


@pytest.fixture
def plant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, str, str], None]]:
    """Replaces the kernels by copies with one piece of one file replaced, until the test ends."""

    def replace_kernels(name: str, old: str, new: str) -> None:
        package = tmp_path / "mutant"
        shutil.copytree(FOLDER, package, ignore=shutil.ignore_patterns("__pycache__", "*.md"))
        (package / "__init__.py").write_text("")
        for other in ("op", "library"):
            (package / f"{other}.py").unlink()
        source = (package / f"{name}.py").read_text(encoding="utf-8")
        assert source.count(old) == 1, f"{name}.py no longer has one {old!r}"
        (package / f"{name}.py").write_text(source.replace(old, new))
        monkeypatch.syspath_prepend(tmp_path)
        invalidate_caches()
        mutant, real = import_module("mutant.triton_launch"), library.launchers
        monkeypatch.setattr(
            library, "launchers", lambda name: mutant if name == "triton" else real(name)
        )

    yield replace_kernels
    for name in [name for name in sys.modules if name.split(".")[0] == "mutant"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_mutation_is_noticed(name: str, plant: Callable[[str, str, str], None]) -> None:
    file, old, new, checks = MUTATIONS[name]
    plant(file, old, new)
    for one in checks:
        with pytest.raises(AssertionError):
            one()
