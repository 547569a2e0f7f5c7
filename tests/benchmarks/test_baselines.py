"""Baselines: the truth is the reference's, every provider meets it, wrong ones do not."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adapter_kernels import zero_init_attention
from benchmarks import baselines
from benchmarks.baselines import BASELINES, Problem, Provider, formula_results, problem, wider
from benchmarks.harness import check, expect
from benchmarks.roofline import Shape

CPU = torch.device("cpu")
SHAPE = Shape(2, 7, 7, 4, 2, 16, 3, True, "float32")
SETTINGS = [
    SHAPE,
    replace(SHAPE, causal=False),
    replace(SHAPE, kv_heads=4),
    replace(SHAPE, dtype="bfloat16"),
]


def results_of(call: Callable[[], Tensor], given: Problem) -> dict[str, Tensor]:
    out = call()
    gradients = torch.autograd.grad(out, list(given.leaves.values()), given.dout)
    return {"out": out, **{f"d{n}": g for n, g in zip(given.leaves, gradients, strict=True)}}


def in_float64(given: Problem) -> Problem:
    def wide(tensors: Any) -> dict[str, Tensor]:
        return {n: x.detach().double() for n, x in tensors.items()}

    leaves = {name: leaf.requires_grad_() for name, leaf in wide(given.leaves).items()}
    return replace(given, leaves=leaves, weights=wide(given.weights), dout=given.dout.double())


@pytest.mark.parametrize("kind", ["prompt", "plain"])
@pytest.mark.parametrize("shape", SETTINGS[:3], ids=Shape.describe)
def test_the_truth_is_that_of_the_reference(kind: str, shape: Shape) -> None:
    given = in_float64(problem(kind, shape, CPU))
    leaves = dict(given.leaves)
    if kind == "prompt":
        leaves["gate"] = leaves["gate"].detach().float().requires_grad_()
    reference = replace(given, leaves=leaves)

    def call() -> Tensor:
        q, k, v = (leaves[n].float() for n in ("q", "k", "v"))
        prompts = [leaves[n].float() for n in ("prompt_k", "prompt_v") if n in leaves]
        gate = [leaves["gate"]] if "gate" in leaves else []
        return zero_init_attention(
            q, k, v, *prompts, *gate, causal=shape.causal, backend="reference"
        )

    reference = replace(reference, dout=given.dout.float())
    truth = formula_results(given, torch.float64)
    for name, got in results_of(call, reference).items():
        torch.testing.assert_close(got.double(), truth[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", SETTINGS[:3], ids=Shape.describe)
def test_the_truth_of_a_block_is_that_of_autograd_through_all_of_it(shape: Shape) -> None:
    given = in_float64(problem("block", shape, CPU))
    width, repeats = shape.head_dim, shape.heads // shape.kv_heads

    def heads(x: Tensor, weight: str) -> Tensor:
        made = F.linear(x, given[weight]).unflatten(-1, (-1, width)).movedim(-2, -3)
        return made if weight == "wq" else made.repeat_interleave(repeats, -3)

    def call() -> Tensor:
        x, prompt = given["x"], given["prompt"]
        q, k, v = (heads(x, weight) for weight in ("wq", "wk", "wv"))
        bias = torch.zeros(shape.tokens, shape.keys, dtype=torch.float64)
        if shape.causal:
            bias = torch.full_like(bias, -torch.inf).triu(1)
        tokens = ((q @ k.mT) * width**-0.5 + bias).softmax(-1) @ v
        own = ((q @ heads(prompt, "wk").mT) * width**-0.5).softmax(-1) @ heads(prompt, "wv")
        return F.linear((tokens + given["gate"] * own).transpose(1, 2).flatten(-2), given["wo"])

    truth = formula_results(given, torch.float64)
    for name, got in results_of(call, given).items():
        torch.testing.assert_close(got, truth[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", SETTINGS, ids=Shape.describe)
@pytest.mark.parametrize(
    "provider",
    [p for p in BASELINES if "cpu" in p.devices],
    ids=lambda p: p.name,
)
def test_providers_meet_the_truth(
    provider: Provider, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what is compiled is the same function
    monkeypatch.setattr(baselines, "compiled", lambda function: function)
    given = problem(provider.kind, shape, CPU)
    own = given.dout.dtype
    expected = expect(formula_results(given, wider(own)), formula_results(given, own))
    results = results_of(provider.build(given), given)
    assert results.keys() == expected.keys()
    errors, wrong = check(results, expected)
    assert not wrong, errors
    for name, error in errors.items():
        assert error <= 0.1 * float(expected[name].truth.abs().max()), name


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", SETTINGS[:3], ids=Shape.describe)
def test_flex_attention_twice_is_the_formula(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "compiled", lambda function: function)
    given = problem("prompt", shape, CPU)
    (provider,) = (p for p in BASELINES if p.name == "two_flex")
    # a processor has its forward pass alone
    leaves = {name: leaf.detach() for name, leaf in given.leaves.items()}
    out = provider.build(replace(given, leaves=leaves))()
    torch.testing.assert_close(
        out.double(), formula_results(given, torch.float64)["out"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("part", ["gate", "diagonal", "scale"])
def test_the_bound_tells_a_mistake_from_rounding(part: str) -> None:
    shape = replace(SHAPE, tokens=64, keys=64, dtype="bfloat16")
    given = problem("prompt", shape, CPU)
    expected = expect(formula_results(given, torch.float32), formula_results(given, torch.bfloat16))
    q, k, v, prompt_k, prompt_v, gate = given.leaves.values()
    scale = 0.8 * shape.head_dim**-0.5 if part == "scale" else None
    mistaken = zero_init_attention(
        q, k, v, prompt_k, prompt_v,
        gate.clamp(max=1.0) if part == "gate" else gate,
        causal=part != "diagonal", scale=scale, backend="reference",
    )  # fmt: skip
    _, wrong = check({"out": mistaken}, {"out": expected["out"]})
    assert wrong.startswith("out is off by")


def test_inputs_are_random_repeatable_and_hide_nothing() -> None:
    first, again = problem("prompt", SHAPE, CPU), problem("prompt", SHAPE, CPU)
    for name, leaf in first.leaves.items():
        assert torch.equal(leaf, again[name]), name
        assert leaf.requires_grad
        assert float(leaf.detach().abs().min()) > 0
    many = baselines.random_gates(32, torch.Generator().manual_seed(1))
    assert float(many.max()) > 1 > float(many.min())
    assert len(many.unique()) > 20
    assert bool((many < 0).any())
    assert float(first["q"].detach().std()) == pytest.approx(1, abs=0.2)


def test_what_a_provider_supports() -> None:
    names = {p.name for p in BASELINES if p.supports(SHAPE, CPU)}
    assert names == {"official", "two_sdpa", "two_sdpa_compiled", "sdpa", "peft_block"}
    cuda = torch.device("cuda")
    bfloat16 = {p.name for p in BASELINES if p.supports(replace(SHAPE, dtype="bfloat16"), cuda)}
    assert bfloat16 == {p.name for p in BASELINES}
    assert "two_flash" not in {p.name for p in BASELINES if p.supports(SHAPE, cuda)}


def test_a_diagonal_off_the_square_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens must be keys = 7, got 5"):
        problem("prompt", replace(SHAPE, tokens=5), CPU)
