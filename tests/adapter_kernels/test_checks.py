"""Do the shared argument checks accept what fits, and say what does not?"""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adapter_kernels import checks, rms_norm
from adapter_kernels.checks import Sizes, passed_before

PAIR = torch.zeros(2, 3)


def says(message: str, check: Callable[[], None]) -> None:
    """Assert that the check raises ValueError with exactly this message."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check()


@pytest.mark.parametrize(
    ("letters", "sizes", "wanted"),
    [
        ("(B, T)", (2, 4), "(B, T) = (2, 4)"),
        ("(B, T)", (None, 4), "(B, T) = (B, 4)"),
        ("(B, T, C)", (None, None, None), "(B, T, C)"),
        ("(B,)", (5,), "(B,) = (5,)"),
        ("that of q", (2, 4), "that of q = (2, 4)"),
        ("that of q", (None, 4), "that of q = (any, 4)"),
        ("()", (), "()"),
    ],
)
def test_shape_names_letters_and_known_sizes(letters: str, sizes: Sizes, wanted: str) -> None:
    says(
        f"x must have shape {wanted}, got (2, 3)",
        lambda: checks.check_shape("x", PAIR, letters, sizes),
    )


def test_shape_accepts_any_of_its_forms() -> None:
    checks.check_shape("x", PAIR, "(B, T)", (2, None))
    checks.check_shape("x", PAIR, "(B,)", (2,), ("(B, T)", (2, 3)))
    says(
        "x must have shape (B,) = (2,) or (B, T) = (B, 4), got (2, 3)",
        lambda: checks.check_shape("x", PAIR, "(B,)", (2,), ("(B, T)", (None, 4))),
    )
    says(
        "x must be a tensor, got tuple",
        lambda: checks.check_shape("x", (2, 3), "(B,)", (2,)),
    )


def test_dtype() -> None:
    checks.check_dtype("x", PAIR, checks.FLOATS)
    says("x must be int32, got float32", lambda: checks.check_dtype("x", PAIR, (torch.int32,)))
    says(
        "x must be float16 or bfloat16 or float32, got int64",
        lambda: checks.check_dtype("x", PAIR.long(), checks.FLOATS),
    )


def test_device() -> None:
    checks.check_device("x", PAIR, "q", PAIR)
    says(
        "x must be on the device of q, cpu, got meta",
        lambda: checks.check_device("x", PAIR.to("meta"), "q", PAIR),
    )


def test_last_dimension() -> None:
    for fine in (
        PAIR,
        PAIR.t()[:, :1],
        torch.zeros(3, 2, 4).transpose(0, 1),
        torch.zeros(0, 3).t(),
    ):
        checks.check_last_contiguous("x", fine)
    says(
        "x must be contiguous in its last dimension, got strides (1, 3)",
        lambda: checks.check_last_contiguous("x", PAIR.t()),
    )


def test_values_and_ranges_report_one_that_is_wrong() -> None:
    index = torch.tensor([[0, 3], [2, 1]])
    checks.check_range("index", index, 0, 3)
    checks.check_values("index", index, "anything", lambda x: x >= 0)
    says("index must be from 0 to 2, got 3", lambda: checks.check_range("index", index, 0, 2))
    says("index must be from 1 to 3, got 0", lambda: checks.check_range("index", index, 1, 3))
    says(
        "index must be even, got 3",
        lambda: checks.check_values("index", index, "even", lambda x: x % 2 == 0),
    )


@pytest.mark.parametrize(
    "tensor", [torch.full((3,), 9).to("meta"), torch.zeros(0)], ids=["other device", "empty"]
)
def test_values_that_cannot_be_read_pass(tensor: Tensor) -> None:
    checks.check_range("index", tensor, 0, 2)
    checks.check_values("index", tensor, "small", lambda x: x < 2)
    assert checks.contents_checked(tensor) == (tensor.device.type == "cpu")


def test_values_are_not_read_while_tracing() -> None:
    def function(x: Tensor) -> Tensor:
        checks.check_range("x", x, 0, 2)
        return x + 1

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert compiled(torch.tensor([7])).tolist() == [8]


def test_a_form_that_passed_is_not_checked_again_and_another_is() -> None:
    x = torch.ones(2, 3)
    remember = passed_before("some function", x, None, 0.5)
    assert remember is not None
    remember()
    assert passed_before("some function", torch.zeros(2, 3), None, 0.5) is None
    others = [
        (x.t().contiguous().t(), None, 0.5),
        (x.double(), None, 0.5),
        (x.to("meta"), None, 0.5),
        (torch.ones(3, 2), None, 0.5),
        (x, x, 0.5),
        (x, None, 1.5),
        (x, None, "0.5"),
    ]
    assert all(passed_before("some function", *other) for other in others)
    assert passed_before("another function", x, None, 0.5)
    # what cannot be compared is checked every time
    for _ in range(2):
        again = passed_before("some function", x, [None], 0.5)
        assert again is not None
        again()


def test_forms_are_forgotten_before_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MOST_FORMS", 3)
    for n in range(20):
        remember = passed_before("growing", torch.ones(n))
        assert remember is not None
        remember()
        assert len(checks._passed) <= 3


def test_a_traced_call_takes_no_short_cut() -> None:
    """Of a form that passed before: looking it up would break the graph."""
    x, weight = torch.randn(2, 5), torch.ones(5)
    expected = rms_norm(x, weight, eps=1e-5)
    compiled = torch.compile(
        lambda x: rms_norm(x, weight, eps=1e-5), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(x), expected)
