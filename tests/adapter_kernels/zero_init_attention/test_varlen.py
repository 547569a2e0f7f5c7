"""Is a prefix that packed sequences share the same as keys of their own that begin alike?"""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from adapter_kernels import zero_init_attention_varlen
from adapter_kernels.backend import INTERPRETED
from adapter_kernels.zero_init_attention.library import attention_op
from tests.adapter_kernels.tolerances import check_bitwise, check_identity
from tests.adapter_kernels.zero_init_attention import cases
from tests.adapter_kernels.zero_init_attention.cases import Case, int32, make_case
from tests.adapter_kernels.zero_init_attention.checkers import gradients, random_like

FLOAT32 = torch.float32
BACKENDS = ("triton",) if INTERPRETED else ("reference", "hybrid")
pytestmark = [pytest.mark.kernel]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cases, "BACKEND", request.param)
    return request.param


def repeated(case: Case) -> Case:
    """The same call with every sequence's prefix among its own keys, and no prefix."""
    assert case.cu_seqlens_k is not None
    bank, lengths, keys, values = (case.prefix_k, case.prefix_v), [], [], []
    assert case.prefix_index is not None
    assert case.prefix_lengths is not None
    for b, f in enumerate(case.prefix_index.tolist()):
        rows = slice(int(case.cu_seqlens_k[b]), int(case.cu_seqlens_k[b + 1]))
        before = int(case.prefix_lengths[f]) if f >= 0 else 0
        for found, own, shared in zip((keys, values), (case.k, case.v), bank, strict=True):
            assert shared is not None
            found.append(torch.cat([shared[f, :before], own[rows]]))
        lengths.append(len(keys[-1]))
    cu = torch.tensor([0, *lengths]).cumsum(0).int().to(case.q.device)
    none = dict.fromkeys(("prefix_k", "prefix_v", "prefix_index", "prefix_lengths"))
    return replace(case, k=torch.cat(keys), v=torch.cat(values), cu_seqlens_k=cu, **none)


@pytest.mark.parametrize(("lengths", "seen"), [((9, -2, 2), (5, 0, 2)), ((5, -7, 6), (5, 0, 5))])
def test_a_length_that_nobody_has_looked_at_is_clamped(
    lengths: tuple[int, ...], seen: tuple[int, ...], backend: str
) -> None:
    """A call that is compiled does not look at values: a backend may not see beyond the bank."""
    found = []
    for given in (lengths, seen):
        case = replace(make_case("shared", "packed_prefix"), prefix_lengths=int32(*given))
        case = case.cast(FLOAT32)
        index = (None, None, case.cu_seqlens_q, case.cu_seqlens_k, None)
        plain = (*case.longest(), case.causal, case.scale, backend)
        # below the public function, which looks
        out, lse, _ = attention_op(
            case.q, case.k, case.v, *case.prompts, *case.prefix, *index, *plain
        )
        found.append((out, lse, *gradients(case, out, lse).values()))
    for got, right in zip(*found, strict=True):
        check_bitwise("clamped", got, right)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", ["none", "shared", "sample_gates", "bank_lengths"])
def test_a_prefix_is_keys_in_front(form: str, causal: bool) -> None:
    case = replace(make_case(form, "packed_prefix").cast(FLOAT32), causal=causal)
    out, lse = case.public()
    expected_out, expected_lse = repeated(case).public()
    blind = expected_lse == -torch.inf
    check_identity("out", out, expected_out)
    check_bitwise("rows without keys", lse == -torch.inf, blind)
    check_identity("lse", lse.masked_fill(blind, 0.0), expected_lse.masked_fill(blind, 0.0))
    # of the leaves, the repeated keys being made of them
    expected = gradients(case, expected_out, expected_lse)
    for name, grad in gradients(case, out, lse).items():
        check_identity(name, grad, expected[name], scale=30.0)


def test_without_a_prefix_the_bits_are_those_of_no_bank(backend: str) -> None:
    # but for the reference's products of matrices, whose sums are cut by their width
    same = check_identity if backend == "reference" else check_bitwise
    case = make_case("shared", "packed_prefix").cast(FLOAT32)
    none = replace(case, prefix_index=int32(-1, -1, -1))
    plain = replace(case, prefix_k=None, prefix_v=None, prefix_index=None, prefix_lengths=None)
    got, expected = none.public(), plain.public()
    same("out", got[0], expected[0])
    blind = expected[1] == -torch.inf
    same("lse", *(x.masked_fill(blind, 0.0) for x in (got[1], expected[1])))
    wanted = gradients(plain, *expected)
    found = gradients(none, *got)
    for name in wanted:
        same(name, found[name], wanted[name])
    for name in ("dprefix_k", "dprefix_v"):
        assert not found[name].any(), name


@pytest.mark.usefixtures("backend")
def test_what_does_not_count_of_a_prefix_is_not_read() -> None:
    case = make_case("shared", "packed_prefix").cast(FLOAT32)
    out, lse = case.public()
    expected = gradients(case, out, lse)
    bank = []
    for x in (case.prefix_k, case.prefix_v):
        assert x is not None
        spoilt = x.detach().clone()
        spoilt[1, 3:] = float("nan")
        bank.append(spoilt.requires_grad_())
    other = replace(case, prefix_k=bank[0], prefix_v=bank[1])
    got = other.public()
    check_bitwise("out", got[0], out)
    for name, grad in gradients(other, *got).items():
        check_bitwise(name, grad, expected[name])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["prefix_k", "prefix_v"])
def test_the_gradient_of_one_part_of_a_prefix_alone(name: str) -> None:
    case = make_case("none", "packed_prefix").cast(FLOAT32)
    expected = gradients(case, *case.public())[f"d{name}"]
    leaves = {other: x.detach() for other, x in case.leaves.items()}
    leaves[name].requires_grad_()
    alone = replace(case, **leaves)
    out, lse = alone.public()
    dlse = random_like(lse, 98).masked_fill(lse == -torch.inf, 1e6)
    grad = torch.autograd.grad([out, lse], leaves[name], [random_like(out), dlse])[0]
    check_bitwise(name, grad, expected)


def arguments(case: Case) -> dict[str, Any]:
    """Those of a call that is right."""
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "prefix_k", "prefix_v", "prefix_index",
             "prefix_lengths")  # fmt: skip
    longest = dict(zip(("max_seqlen_q", "max_seqlen_k"), case.longest(), strict=True))
    return {name: getattr(case, name) for name in names} | longest


WRONG = {
    "alone": ({"prefix_v": None, "prefix_index": None}, "prefix_k, prefix_v and prefix_index must"),
    "no bank": ({"prefix_k": None, "prefix_v": None}, "got prefix_index, prefix_lengths alone"),
    "pages": (
        {"page_table": torch.zeros(3, 1, dtype=torch.int32)},
        "k must have shape (N, page, G, D)",
    ),
    "shape": ({"prefix_k": torch.randn(3, 5, 2, 9)}, "prefix_k must have shape (F, L, G, D)"),
    "values": ({"prefix_v": torch.randn(3, 4, 2, 8)}, "prefix_v must have shape"),
    "heads": ({"prefix_k": torch.randn(3, 5, 1, 8)}, "prefix_k must have shape (F, L, G, D)"),
    "dtype": (
        {"prefix_k": torch.randn(3, 5, 2, 8).half()},
        "prefix_k must be float32, got float16",
    ),
    "empty": (
        {"prefix_k": torch.randn(0, 5, 2, 8), "prefix_v": torch.randn(0, 5, 2, 8)},
        "prefix_k must hold at least one prefix",
    ),
    "index": ({"prefix_index": int32(0, 1)}, "prefix_index must have shape (B,)"),
    "range": ({"prefix_index": int32(0, 3, 1)}, "prefix_index must be from -1 to 2, got 3"),
    "lengths": ({"prefix_lengths": int32(1, 2)}, "prefix_lengths must have shape (F,)"),
    "long": ({"prefix_lengths": int32(1, 6, 2)}, "prefix_lengths must be from 0 to 5, got 6"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_named(wrong: str) -> None:
    changed, message = WRONG[wrong]
    given = arguments(make_case("none", "packed_prefix").cast(FLOAT32)) | changed
    with pytest.raises(ValueError, match=re.escape(message)):
        zero_init_attention_varlen(**given)


def test_pages_have_no_prefix() -> None:
    case = make_case("none", "packed_prefix").cast(FLOAT32)
    pages = {"k": case.k.detach().view(12, 1, 2, 8), "v": case.v.detach().view(12, 1, 2, 8)}
    table = torch.arange(36, dtype=torch.int32).view(3, 12) % 12
    with pytest.raises(ValueError, match="prefix_k must not come with page_table"):
        zero_init_attention_varlen(**arguments(case) | pages, page_table=table)
