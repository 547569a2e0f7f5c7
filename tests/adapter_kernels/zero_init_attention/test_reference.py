"""Is reference.py right? The paper's words, gradcheck, and six mutations that must be noticed."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from adapter_kernels.zero_init_attention import library, reference
from tests.adapter_kernels.tolerances import check_float64
from tests.adapter_kernels.zero_init_attention import cases, checkers
from tests.adapter_kernels.zero_init_attention.cases import FORMS, LAYOUTS, make_case

FOLDER = Path(reference.__file__).parent
PROMPTED = FORMS[1:]
# in dependency order: what a mutated copy of the reference backend consists of
FILES = ("reference", "layouts", "reference_launch")


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "BACKEND", "reference")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_papers_equations_token_by_token(form: str, layout: str) -> None:
    checkers.check_equations(form, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_in_float64(form: str, layout: str) -> None:
    case = make_case(form, layout, head_dim=2)
    names = list(case.leaves)

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = replace(case, **dict(zip(names, leaves, strict=True))).operation()
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    # the whole Jacobian where it is small, random projections of it elsewhere
    whole = form == "bank_lengths" and layout == "packed"
    leaves = tuple(case.leaves.values())
    assert torch.autograd.gradcheck(function, leaves, atol=1e-7, fast_mode=not whole)


@pytest.mark.parametrize("layout", ["causal", "blind", "packed"])
@pytest.mark.parametrize("form", PROMPTED)
def test_gate_zero_is_bitwise_plain_attention(form: str, layout: str) -> None:
    checkers.check_gate_zero_is_plain_attention(form, layout)


@pytest.mark.parametrize("layout", ["causal", "packed"])
@pytest.mark.parametrize("form", PROMPTED)
def test_output_is_linear_in_the_gate(form: str, layout: str) -> None:
    checkers.check_linear_in_the_gate(form, layout)


@pytest.mark.parametrize("form", ["shared", "sample_gates", "bank"])
def test_prompt_rows_have_no_order(form: str) -> None:
    checkers.check_prompt_rows_may_be_permuted(form, "padded")


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_decode_is_a_row_of_prefill(form: str, tokens: int) -> None:
    checkers.check_decode_is_a_row_of_prefill(form, tokens)


@pytest.mark.parametrize("layout", ["causal", "packed"])
@pytest.mark.parametrize("form", PROMPTED)
def test_dgate_is_dout_times_prompt_out(form: str, layout: str) -> None:
    checkers.check_dgate_is_dout_times_prompt_out(form, layout)


@pytest.mark.parametrize("layout", ["causal", "padded", "blind"])
@pytest.mark.parametrize("form", ["shared", "sample_gates", "bank_lengths"])
def test_a_sequence_does_not_depend_on_its_batch(form: str, layout: str) -> None:
    checkers.check_batch_of_one(form, layout)


def test_adapter_index_is_read_at_every_call() -> None:
    checkers.check_index_is_read_at_every_call()


# planted mutation: what is substituted in which file, and the checks that must notice it
MUTATIONS: dict[str, tuple[dict[str, list[tuple[str, str]]], list[Callable[[], None]]]] = {
    "gate dropped": (
        {"reference": [("return prompt.gate * attend", "return attend")]},
        [
            lambda: checkers.check_equations("shared", "causal"),
            lambda: checkers.check_gate_zero_is_plain_attention("bank", "packed"),
            lambda: checkers.check_linear_in_the_gate("sample", "causal"),
        ],
    ),
    "gate dropped in the backward": (
        {"reference": [("gated = prompt.gate * p", "gated = p")]},
        [
            lambda: checkers.check_equations("shared", "causal"),
            lambda: checkers.check_gate_zero_is_plain_attention("shared", "causal"),
        ],
    ),
    "sign of delta": (
        {"reference": [("value=-1.0", "value=1.0")]},
        [
            lambda: checkers.check_equations("none", "bidirectional"),
            lambda: checkers.check_equations("bank", "packed"),
        ],
    ),
    "sign of the prompt's delta": (
        {"reference": [("gated * (dp - delta)", "gated * (dp + delta)")]},
        [lambda: checkers.check_equations("sample_gates", "causal")],
    ),
    "sign of dlse": (
        {"reference": [("delta - dlse", "delta + dlse")]},
        [lambda: checkers.check_equations("shared", "bidirectional")],
    ),
    "wrong diagonal, top-left": (
        {"layouts": [("(1,), k.shape[1] - q.shape[1]", "(1,), 0")]},
        [
            lambda: checkers.check_equations("none", "causal"),
            lambda: checkers.check_decode_is_a_row_of_prefill("shared", 3),
        ],
    ),
    "wrong diagonal, one short": (
        {"layouts": [("rules.append(j <= i", "rules.append(j < i")]},
        [
            lambda: checkers.check_equations("shared", "causal"),
            lambda: checkers.check_equations("none", "packed"),
        ],
    ),
    "wrong group head": (
        {
            "layouts": [
                (
                    "x.view(b, t, groups, h // groups, d).permute(0, 2, 3, 1, 4)",
                    "x.view(b, t, h // groups, groups, d).permute(0, 3, 2, 1, 4)",
                ),
                (
                    "x.view(b, x.shape[1], h // x.shape[1], t, d).permute(0, 3, 1, 2, 4)",
                    "x.view(b, x.shape[1], h // x.shape[1], t, d).permute(0, 3, 2, 1, 4)",
                ),
            ]
        },
        [
            lambda: checkers.check_equations("none", "causal"),
            lambda: checkers.check_equations("shared", "packed"),
        ],
    ),
    "prompt mask ignored": (
        {"layouts": [("bias, _ = visibility(q, k, ends=length)", "bias = None")]},
        [
            lambda: checkers.check_equations("bank_lengths", "causal"),
            lambda: checkers.check_equations("bank_lengths", "packed"),
        ],
    ),
    "stale index": (
        {
            "layouts": [
                (
                    "row, present = bank_rows(adapter_index, k.shape[0])",
                    "row, present = STALE.setdefault(0, bank_rows(adapter_index, k.shape[0]))",
                ),
                ("class Padded(NamedTuple)", "STALE = {}\n\n\nclass Padded(NamedTuple)"),
            ]
        },
        [checkers.check_index_is_read_at_every_call],
    ),
}


def mutated_backend(substitutions: dict[str, list[tuple[str, str]]]) -> ModuleType:
    """A copy of the reference backend with pieces of its source replaced, as its own package."""
    package = ModuleType("mutant")
    package.__path__ = []
    sys.modules["mutant"] = package
    for name in FILES:
        source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        for old, new in substitutions.get(name, []):
            assert source.count(old) == 1, f"{name}.py no longer has one {old!r}"
            source = source.replace(old, new)
        module = ModuleType(f"mutant.{name}")
        module.__package__ = "mutant"
        sys.modules[f"mutant.{name}"] = module
        setattr(package, name, module)
        exec(compile(source, f"mutant/{name}.py", "exec"), module.__dict__)
    return sys.modules["mutant.reference_launch"]


@pytest.fixture
def plant(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[dict[str, list[tuple[str, str]]]], None]]:
    """Replaces the reference backend by a mutated copy until the test ends."""

    def replace_backend(substitutions: dict[str, list[tuple[str, str]]]) -> None:
        mutant = mutated_backend(substitutions)
        monkeypatch.setattr(library, "launchers", {"reference": mutant}.__getitem__)

    yield replace_backend
    for name in [name for name in sys.modules if name.split(".")[0] == "mutant"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_mutation_is_noticed(
    name: str, plant: Callable[[dict[str, list[tuple[str, str]]]], None]
) -> None:
    substitutions, checks = MUTATIONS[name]
    plant({})
    for check in checks:
        check()
    plant(substitutions)
    for check in checks:
        with pytest.raises(AssertionError):
            check()


@pytest.mark.parametrize(
    ("needs", "products"),
    [
        # S products of rows with keys, P products of rows with prompt rows
        ((False, False, False, True, True, True), {"S": 0, "P": 4}),
        ((False, False, False, False, False, True), {"S": 0, "P": 2}),
        ((False, False, True, False, False, False), {"S": 2, "P": 0}),
        ((True, False, False, False, False, False), {"S": 3, "P": 3}),
        ((True, True, True, True, True, True), {"S": 5, "P": 5}),
    ],
)
def test_backward_multiplies_only_what_is_needed(
    needs: tuple[bool, ...], products: dict[str, int]
) -> None:
    """The matrix products of one backward, counted: 2 B G N (S or P) D operations each."""
    b, g, n, s, p, d = 2, 3, 5, 7, 11, 4
    q, dout = (torch.randn(b, g, n, d) for _ in range(2))
    tokens = reference.Segment(*(torch.randn(b, g, s, d) for _ in "kv"))
    prompt = reference.Segment(
        *(torch.randn(b, g, p, d) for _ in "kv"), gate=torch.randn(b, g, n, 1)
    )
    with FlopCounterMode(display=False) as counter:
        reference.backward(dout, None, q, tokens, prompt, 0.5, needs)
    expected = 2 * b * g * n * d * (s * products["S"] + p * products["P"])
    assert counter.get_total_flops() == expected


def test_delta_of_the_tokens_follows_from_the_fused_output() -> None:
    """rowsum(P o dP) = rowsum(dO o out) - g delta_p: what a kernel computes instead, in float64."""
    g = torch.Generator().manual_seed(4)
    q, dout = (torch.randn(2, 3, 5, 8, generator=g, dtype=torch.float64) for _ in range(2))
    k, v, prompt_k, prompt_v = (
        torch.randn(2, 3, rows, 8, generator=g, dtype=torch.float64) for rows in (7, 7, 4, 4)
    )
    gate = torch.randn(2, 3, 5, 1, generator=g, dtype=torch.float64)
    tokens = reference.Segment(k, v)
    prompt = reference.Segment(prompt_k, prompt_v, gate=gate)
    out, lse = reference.forward(q, tokens, prompt, 0.4)
    *_, delta_p = reference.prompt_backward(dout, q, prompt, 0.4, (False,) * 3)
    p = torch.exp(reference.scores(q, tokens, 0.4) - lse)
    delta = (p * (dout @ v.mT)).sum(-1, keepdim=True)
    check_float64("delta", (dout * out).sum(-1, keepdim=True) - gate * delta_p, delta)
