"""Is the hybrid right? The same policy as the kernels', with torch's flash kernel for the CPU."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adapter_kernels.zero_init_attention import hybrid_launch, library_attention
from adapter_kernels.zero_init_attention.library import attention_op
from tests.adapter_kernels.zero_init_attention import cases, checkers
from tests.adapter_kernels.zero_init_attention.cases import FORMS, LAYOUTS, make_case
from tests.adapter_kernels.zero_init_attention.kernel_runs import check_against_reference

FLOAT32 = torch.float32


@pytest.fixture(autouse=True)
def hybrid_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "BACKEND", "hybrid")


@pytest.mark.parametrize("lse_gradient", [True, False])
@pytest.mark.parametrize("dtype", [FLOAT32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_layout(
    form: str, layout: str, dtype: torch.dtype, lse_gradient: bool
) -> None:
    check_against_reference(make_case(form, layout).cast(dtype), "hybrid", lse_gradient)


@pytest.mark.parametrize("layout", ["causal", "blind", "packed"])
@pytest.mark.parametrize("form", FORMS[1:])
def test_gate_zero_is_bitwise_plain_attention(form: str, layout: str) -> None:
    checkers.check_gate_zero_is_plain_attention(form, layout)


@pytest.mark.parametrize("form", ["shared", "bank"])
def test_output_is_linear_in_the_gate(form: str) -> None:
    checkers.check_linear_in_the_gate(form, "packed")


@pytest.mark.parametrize("form", ["shared", "bank_lengths"])
def test_dgate_is_dout_times_prompt_out(form: str) -> None:
    checkers.check_dgate_is_dout_times_prompt_out(form, "causal")


@pytest.mark.parametrize("layout", ["causal", "padded", "blind"])
def test_a_sequence_does_not_depend_on_its_batch(layout: str) -> None:
    checkers.check_batch_of_one("bank_lengths", layout)


def test_adapter_index_is_read_at_every_call() -> None:
    checkers.check_index_is_read_at_every_call()


class Counting:
    """A library that counts its calls."""

    def __init__(self, real: library_attention.Library) -> None:
        self.real, self.calls = real, {"forward": 0, "backward": 0}

    def forward(self, *args: object) -> tuple[Tensor, ...]:
        """Count, then attend."""
        self.calls["forward"] += 1
        return self.real.forward(*args)  # pyright: ignore[reportArgumentType]

    def backward(self, *args: object) -> tuple[Tensor, ...]:
        """Count, then differentiate."""
        self.calls["backward"] += 1
        return self.real.backward(*args)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("layout", "forward", "backward"), [("bidirectional", 1, 1), ("causal", 2, 2), ("packed", 3, 3)]
)
def test_the_library_attends_and_only_where_it_must(
    layout: str, forward: int, backward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 queries of 7 keys are a rectangle and a triangle; packed sequences go one by one."""
    counting = Counting(library_attention.LIBRARIES["cpu"])
    monkeypatch.setattr(hybrid_launch, "library_of", lambda q: counting)
    case = make_case("shared", layout).cast(FLOAT32)
    out, _ = case.public()
    assert counting.calls == {"forward": forward, "backward": 0}
    frozen = replace(case, q=case.q.detach(), k=case.k.detach(), v=case.v.detach())
    frozen.public()[0].sum().backward()
    assert counting.calls["backward"] == 0, "the prompt's gradients need nothing of the tokens"
    out.sum().backward()
    assert counting.calls["backward"] == backward


def test_what_is_kept_is_the_tokens_own_output() -> None:
    case = make_case("shared", "causal").cast(FLOAT32)
    plain = (*[None] * 9, 0, 0, True, case.scale, "hybrid")
    leaves = [x.detach() for x in (case.q, case.k, case.v)]
    nothing = (None,) * 5
    own = attention_op(*leaves, *case.prompts, *plain)[2]
    alone, _, kept = attention_op(*leaves, *nothing, *plain)
    assert torch.equal(own, alone)
    assert kept.numel() == 0, "without a prompt the output itself is kept"
