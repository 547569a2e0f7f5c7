"""Is the reference backend as accurate as torch allows, in every dtype? The numerics policy's rule.

Truth is the same operation in float64 on the same rounded inputs; the baseline is the formula
written in the dtype itself, as a model would write it without this package.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adapter_kernels import (
    gated_prompt_attention,
    zero_init_attention_decode,
)
from adapter_kernels.zero_init_attention.library import decode_op, prompt_op
from tests.adapter_kernels.tolerances import (
    GRADIENT_FACTOR,
    check_as_accurate_as_eager,
    check_finite,
    largest,
)
from tests.adapter_kernels.zero_init_attention import cases
from tests.adapter_kernels.zero_init_attention.cases import Case, int32, make_case, normal
from tests.adapter_kernels.zero_init_attention.checkers import random_like

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "BACKEND", "reference")


def eager(case: Case) -> tuple[Tensor, Tensor]:
    """The dense formula with a shared prompt, every operation in the dtype of the case."""
    assert case.prompt_k is not None
    assert case.prompt_v is not None
    assert case.gate is not None
    repeats = case.q.shape[2] // case.k.shape[2]
    q = case.q.transpose(1, 2)
    k, v = (x.transpose(1, 2).repeat_interleave(repeats, 1) for x in (case.k, case.v))
    prompt_k, prompt_v = (
        x.transpose(0, 1).repeat_interleave(repeats, 0) for x in (case.prompt_k, case.prompt_v)
    )
    s = q @ k.mT * case.scale
    if case.causal:
        hidden = torch.ones(s.shape[-2:], dtype=torch.bool).triu(1 + s.shape[-1] - s.shape[-2])
        s = s.masked_fill(hidden, -torch.inf)
    tokens = s.softmax(-1) @ v
    prompt = (q @ prompt_k.mT * case.scale).softmax(-1) @ prompt_v
    ungated = prompt.transpose(1, 2)
    return tokens.transpose(1, 2) + case.gate.to(q.dtype)[:, None] * ungated, ungated


def dense_case(kind: str, seed: int = 3) -> Case:
    """B = 2, T = 37, S = 53, H = 6, G = 2, D = 40, P = 10, with something hard in it."""
    g = torch.Generator().manual_seed(seed)
    case = make_case("shared", "bidirectional" if kind == "bidirectional" else "causal")
    gate = {"gate 0": 0.0, "gate 0.001": 1e-3, "gate 1": 1.0, "gate -1": -1.0}.get(kind)
    prompt = [normal(g, 10, 2, 40) for _ in "kv"]
    case = replace(
        case,
        q=normal(g, 2, 37, 6, 40),
        k=normal(g, 2, 53, 2, 40),
        v=normal(g, 2, 53, 2, 40),
        prompt_k=prompt[0],
        prompt_v=prompt[1],
        gate=1.5 * normal(g, 6) if gate is None else torch.full((6,), gate),
        scale=40**-0.5,
    )
    if kind == "large token scores":
        case = replace(case, k=case.k * 8)
    if kind == "large prompt scores":
        case = replace(case, prompt_k=prompt[0] * 8)
    if kind == "large prompt values":
        # what the tokens leave of delta is a small difference of large numbers
        case = replace(case, prompt_v=prompt[1] * 100)
    return case


KINDS = (
    "plain",
    "bidirectional",
    "gate 0",
    "gate 0.001",
    "gate 1",
    "gate -1",
    "large token scores",
    "large prompt scores",
    "large prompt values",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients_are_as_accurate_as_eager(dtype: torch.dtype, kind: str) -> None:
    ours = dense_case(kind).cast(dtype)
    plain, truth = ours.cast(dtype), ours.double()
    out, lse = ours.public()
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    eager_out, _ = eager(plain)
    truth_out, ungated = eager(truth)
    check_as_accurate_as_eager("out", out, eager_out, truth_out)
    dout = random_like(out)
    results = []
    for case, y in ((ours, out), (plain, eager_out), (truth, truth_out)):
        results.append(torch.autograd.grad(y, list(case.leaves.values()), dout.to(y.dtype)))
    for name, leaf, *grads in zip(ours.leaves, ours.leaves.values(), *results, strict=True):
        assert grads[0].dtype == leaf.dtype
        # a gate's gradient is a long sum, whose terms' size bounds what rounding can do to it
        terms = float((dout.double() * ungated).detach().abs().sum((0, 1, 3)).max())
        floor = torch.finfo(dtype).eps * terms if name == "gate" else None
        if name == "gate":
            grads[1] = grads[1].to(dtype)
        check_as_accurate_as_eager(f"d{name}", *grads, factor=GRADIENT_FACTOR, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_is_as_accurate_as_eager(dtype: torch.dtype) -> None:
    case = dense_case("plain").cast(dtype)
    row = replace(case, q=case.q[:, -1:])
    lengths = int32(53, 53)
    out = zero_init_attention_decode(
        row.q, row.k, row.v, *row.prompts[:3], cache_lengths=lengths, scale=row.scale
    )
    truth = row.double()
    expected = decode_op(
        truth.q, truth.k, truth.v, *truth.prompts, lengths, *(None,) * 3, truth.scale, "reference"
    )
    check_as_accurate_as_eager("out", out, eager(row)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompt_segment_rounds_its_sum_once(dtype: torch.dtype) -> None:
    case = dense_case("plain").cast(dtype)
    base = random_like(case.q)
    got = gated_prompt_attention(
        case.q, *case.prompts[:3], scale=case.scale, out=base, backend="reference"
    )
    truth = case.double()
    args = (truth.q, *truth.prompts, None, base.double(), truth.scale, "reference")
    expected = prompt_op(*args)
    # half a unit in the last place of every element, and the float32 inside
    bound = expected.abs() * torch.finfo(dtype).eps / 2 + 1e-6 * largest(expected)
    assert bool(((got.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_fifty_stay_finite(dtype: torch.dtype) -> None:
    """Each segment has its own maximum: large scores in one do not wash out the other."""
    case = dense_case("plain")
    for name in ("k", "prompt_k"):
        large = replace(case, **{name: getattr(case, name) * 50}).cast(dtype)
        out, lse = large.public()
        grads = torch.autograd.grad([out, lse], list(large.leaves.values()), [out, lse])
        for label, x in zip(("out", "lse", *large.leaves), (out, lse, *grads), strict=True):
            check_finite(label, x)
        # the other segment still weighs: its values' gradient does not vanish
        other = "prompt_v" if name == "k" else "v"
        assert largest(grads[list(large.leaves).index(other)]) > 0.1
