"""linear_cross_entropy against F.cross_entropy on the logits: values, gradients, memory, work."""

import importlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from adapter_kernels import linear_cross_entropy
from adapter_kernels.linear_cross_entropy import (
    linear_cross_entropy_dweight_reference,
    linear_cross_entropy_reference,
)
from tests.adapter_kernels.small_ops import (
    DTYPES,
    Spy,
    assert_as_accurate_as_eager,
    assert_equal,
    draw,
    gradients,
)

OPS = torch.ops.adapter_kernels
MODULE = importlib.import_module("adapter_kernels.linear_cross_entropy")
REDUCTIONS = ("mean", "sum", "none")
IGNORE = -100


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 3 rows, so that small inputs have several and a ragged last one."""
    monkeypatch.setattr(MODULE, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(MODULE, "CHUNK_ROWS", 3)


def some_labels(*shape: int, vocabulary: int, ignore_index: int = IGNORE) -> Tensor:
    """Random labels, about a third of them ignored, and at least one of each kind."""
    labels = torch.randint(vocabulary, shape)
    labels[torch.rand(shape) < 0.3] = ignore_index
    labels.view(-1)[0], labels.view(-1)[1] = 0, ignore_index
    return labels


def formula(x: Tensor, weight: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """The logits in the dtype of x, everything after them in at least float32."""
    logits = x @ weight.t()
    logits = logits.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, -2)
    loss = functional.cross_entropy(logits, labels.flatten(), reduction=reduction)
    return loss.view(labels.shape) if reduction == "none" else loss


class Creations(TorchDispatchMode):
    """Records the sizes of the tensors that are made, inside this package's ops too."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        inside = {
            OPS.linear_cross_entropy.default: linear_cross_entropy_reference,
            OPS.linear_cross_entropy_dweight.default: linear_cross_entropy_dweight_reference,
        }
        if func in inside:
            with self:
                return inside[func](*args)
        out = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
                self.sizes.append(made.numel())
        return out


def test_gradcheck_in_float64(small_chunks: None) -> None:
    torch.manual_seed(0)
    x, weight = draw(8, 3, dtype=torch.float64), draw(5, 3, dtype=torch.float64)
    labels = some_labels(8, vocabulary=5)
    assert torch.autograd.gradcheck(
        lambda x, w: OPS.linear_cross_entropy(x, w, labels, IGNORE, True)[0], (x, weight)
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_of_loss_and_gradients(
    small_chunks: None, dtype: torch.dtype, reduction: str
) -> None:
    torch.manual_seed(1)
    x, weight = draw(3, 7, 19, dtype=dtype), draw(53, 19, dtype=dtype)
    labels = some_labels(3, 7, vocabulary=53)
    assert_as_accurate_as_eager(
        lambda x, w: (linear_cross_entropy(x, w, labels, reduction=reduction),),
        lambda x, w: (formula(x, w, labels, reduction),),
        (x, weight),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_of_confident_rows(dtype: torch.dtype) -> None:
    """Where the label has nearly all the probability, the gradient must not cancel away."""
    torch.manual_seed(2)
    weight = draw(31, 16, dtype=dtype)
    labels = torch.arange(31)
    x = (weight.detach().float() * 1.5).to(dtype).requires_grad_()
    assert_as_accurate_as_eager(
        lambda x, w: (linear_cross_entropy(x, w, labels),),
        lambda x, w: (formula(x, w, labels),),
        (x, weight),
    )


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    x, weight, labels = draw(23, 11), draw(37, 11), some_labels(23, vocabulary=37)
    results = []
    for rows in (1, 4, 1000):
        monkeypatch.setattr(MODULE, "CHUNK_ELEMENTS", 1)
        monkeypatch.setattr(MODULE, "CHUNK_ROWS", rows)
        loss = linear_cross_entropy(x, weight, labels)
        results.append((loss, *torch.autograd.grad(loss, (x, weight))))
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_no_tensor_is_as_large_as_the_logits() -> None:
    rows, width, vocabulary = 1300, 3, 1900
    x, weight = draw(rows, width), draw(vocabulary, width)
    labels = torch.randint(vocabulary, (rows,))
    with Creations() as ours:
        linear_cross_entropy(x, weight, labels).backward()
    # the module states its bound: the larger of 2^20 logits and 128 rows
    assert max(ours.sizes) <= 2**20 < rows * vocabulary / 2
    assert max(ours.sizes) > 2**19
    with Creations() as eager:
        formula(x, weight, labels).backward()
    assert max(eager.sizes) == rows * vocabulary


def test_computes_no_gradient_that_nobody_asked_for() -> None:
    labels = some_labels(9, vocabulary=7)
    for need_dx, need_dweight in ((True, False), (False, True), (True, True), (False, False)):
        x, weight = draw(9, 5, grad=need_dx), draw(7, 5, grad=need_dweight)
        with Spy() as spy:
            loss = linear_cross_entropy(x, weight, labels)
            if need_dx or need_dweight:
                loss.backward()
        names = [name for name, _, _ in spy.calls]
        assert names == ["linear_cross_entropy"] + ["linear_cross_entropy_dweight"] * need_dweight
        assert spy.calls[0][1][-1] is need_dx
        assert spy.calls[0][2][1].numel() == 45 * need_dx
        assert [x.grad is not None, weight.grad is not None] == [need_dx, need_dweight]


def test_frozen_weight_makes_no_tensor_of_its_size() -> None:
    x, weight, labels = draw(3, 2), draw(101, 50, grad=False), torch.tensor([1, 2, 3])
    x = draw(3, 50)
    with Creations() as frozen:
        linear_cross_entropy(x, weight, labels).backward()
    assert max(frozen.sizes) == 3 * 101
    with Creations() as trained:
        linear_cross_entropy(x, weight.requires_grad_(), labels).backward()
    assert max(trained.sizes) == 101 * 50


def test_keeps_the_gradient_instead_of_the_logits() -> None:
    x, labels = draw(9, 5), some_labels(9, vocabulary=700)
    weight = draw(700, 5, grad=False)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()), id):
        linear_cross_entropy(x, weight, labels, reduction="sum")
    # dx, and the labels, which say where it counts
    assert saved == [45, 9]
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, labels).grad_fn is None


def test_a_gradient_that_is_nan_where_nothing_counts_stays_there() -> None:
    x, weight, labels = draw(9, 5), draw(7, 5), some_labels(9, vocabulary=7)
    labels[4] = -100
    loss = linear_cross_entropy(x, weight, labels, reduction="none")
    # a mean over parts of which one has no label is 0 / 0
    dloss = torch.rand(9, dtype=loss.dtype).masked_fill(labels == -100, torch.nan)
    found = torch.autograd.grad(loss, (x, weight), dloss)
    wanted = torch.autograd.grad(
        linear_cross_entropy(x, weight, labels, reduction="none"), (x, weight), dloss.nan_to_num(0)
    )
    for got, right in zip(found, wanted, strict=True):
        assert torch.equal(got, right)
        assert got.abs().max() > 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_are_never_touched(small_chunks: None, reduction: str) -> None:
    torch.manual_seed(4)
    x, weight, labels = draw(3, 5, 7), draw(11, 7), some_labels(3, 5, vocabulary=11)
    poisoned = x.detach().clone()
    poisoned[labels == IGNORE] = float("nan")
    poisoned.requires_grad_()
    results = []
    for inputs in ((x, weight), (poisoned, weight)):
        loss = linear_cross_entropy(*inputs, labels, reduction=reduction)
        results.append((loss, *gradients((loss,), inputs)))
    assert_equal(*results)
    dx = results[1][1]
    assert torch.equal(dx[labels == IGNORE], torch.zeros(int((labels == IGNORE).sum()), 7))
    assert bool((dx[labels != IGNORE] != 0).all())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_batch_without_a_label_has_loss_zero(reduction: str) -> None:
    x, weight, labels = draw(2, 3, 5), draw(7, 5), torch.full((2, 3), IGNORE)
    loss = linear_cross_entropy(x, weight, labels, reduction=reduction)
    assert torch.equal(loss, torch.zeros((2, 3) if reduction == "none" else ()))
    assert_equal(gradients((loss,), (x, weight)), (torch.zeros(2, 3, 5), torch.zeros(7, 5)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_row_may_count(reduction: str) -> None:
    """No label is the one of rows that do not count, not even -100."""
    x, weight, labels = draw(3, 5, 7), draw(11, 7), torch.randint(11, (3, 5))
    results = []
    for ignore_index in (None, IGNORE):
        loss = linear_cross_entropy(
            x, weight, labels, ignore_index=ignore_index, reduction=reduction
        )
        results.append((loss, *gradients((loss,), (x, weight))))
    assert_equal(*results)


@pytest.mark.parametrize("ignore_index", [-1, 3])
def test_any_ignore_index(ignore_index: int) -> None:
    x, weight = draw(13, 5), draw(7, 5)
    labels = some_labels(13, vocabulary=7, ignore_index=ignore_index)
    loss = linear_cross_entropy(x, weight, labels, ignore_index=ignore_index)
    expected = functional.cross_entropy(x @ weight.t(), labels, ignore_index=ignore_index)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for got, wanted in zip(
        torch.autograd.grad(loss, (x, weight)),
        torch.autograd.grad(expected, (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


def test_one_row_without_a_batch() -> None:
    x, weight = draw(5), draw(7, 5)
    for reduction in REDUCTIONS:
        loss = linear_cross_entropy(x, weight, torch.tensor(4), reduction=reduction)
        assert loss.shape == ()
        expected = functional.cross_entropy(weight @ x, torch.tensor(4))
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_strides_are_free() -> None:
    x, weight = draw(6, 3, 10), draw(5, 11)
    labels = some_labels(6, 3, vocabulary=11).t()
    views = (x.transpose(0, 1)[..., ::2], weight.t())
    got = linear_cross_entropy(*views, labels)
    expected = linear_cross_entropy(*(view.contiguous() for view in views), labels.contiguous())
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    for one, other in zip(
        gradients((got,), (x, weight)), gradients((expected,), (x, weight)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_large_logits_stay_finite() -> None:
    x = torch.tensor([[3e4, 0.0], [0.0, 3e4]]).requires_grad_()
    loss = linear_cross_entropy(x, torch.eye(2), torch.tensor([0, 0]), reduction="none")
    assert loss.tolist() == [0, 3e4]
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert dx.tolist() == [[0, 0], [-1, 1]]


def eighths(*shape: int) -> Tensor:
    """Random multiples of 1/8, whose products float32 holds exactly, beside thousands too."""
    return torch.randn(shape).mul(8).round().div(8)


def test_large_logits_lose_nothing_small() -> None:
    """Loss and gradients where log sum exp is thousands, and what it adds to the peak is one."""
    torch.manual_seed(6)
    x, weight = eighths(7, 5), eighths(11, 5)
    x[:, 0], weight[:, 0] = torch.tensor([1.0, -1, 2, -2, 1, 1, 1]), 8192
    labels = torch.randint(11, (7,))
    assert_as_accurate_as_eager(
        lambda x, w: (linear_cross_entropy(x, w, labels, reduction="none"),),
        lambda x, w: (formula(x, w, labels, "none"),),
        (x.requires_grad_(), weight.requires_grad_()),
    )


def test_runs_under_autocast() -> None:
    torch.manual_seed(5)
    x, weight, labels = draw(9, 16), draw(31, 16), some_labels(9, vocabulary=31)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, labels)
    expected = formula(x, weight, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2**-6, atol=0)
    got = torch.autograd.grad(loss, (x, weight))
    for one, other in zip(got, torch.autograd.grad(expected, (x, weight)), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() <= 4 * 2**-8 * other.abs().max()


def test_second_derivative_is_refused() -> None:
    x = draw(3, 5)
    loss = linear_cross_entropy(x, draw(7, 5), torch.tensor([1, 2, 3]))
    with pytest.raises(RuntimeError, match="linear_cross_entropy is differentiable once"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_opcheck() -> None:
    x, weight, labels = draw(5, 3), draw(7, 3), some_labels(5, vocabulary=7)
    frozen = (x.detach(), weight.detach())
    for arguments in ((x, weight, labels, IGNORE, True), (*frozen, labels, IGNORE, False)):
        torch.library.opcheck(OPS.linear_cross_entropy.default, arguments)
    for ignored in (IGNORE, None):
        arguments = (torch.rand(5), *frozen, labels, ignored)
        torch.library.opcheck(OPS.linear_cross_entropy_dweight.default, arguments)


def test_compiles_in_one_graph() -> None:
    labels = some_labels(5, vocabulary=7)
    for frozen in (False, True):
        inputs = (draw(5, 3), draw(7, 3, grad=not frozen))

        def step(x: Tensor, weight: Tensor) -> Tensor:
            return linear_cross_entropy(x, weight, labels)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
        plain = step(*inputs)
        assert_equal((compiled,), (plain,))
        used = inputs[:1] if frozen else inputs
        assert_equal(gradients((compiled,), used), gradients((plain,), used))


@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(0, 5, 7), (3, 0, 7), (3, 5, 0)])
def test_empty_inputs(rows: int, width: int, vocabulary: int) -> None:
    x, weight = draw(rows, width), draw(vocabulary, width)
    labels = torch.zeros(rows).long() if vocabulary else torch.full((rows,), IGNORE)
    loss = linear_cross_entropy(x, weight, labels)
    expected = torch.tensor(float(vocabulary)).log() if rows and vocabulary else torch.tensor(0.0)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_equal(
        torch.autograd.grad(loss, (x, weight)),
        (torch.zeros(rows, width), torch.zeros(vocabulary, width)),
    )


def test_label_out_of_range_is_ignored_where_values_are_not_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MODULE, "check_values", lambda *_: None)
    x, weight = draw(4, 5), draw(7, 5)
    wrong, ignored = torch.tensor([1, 7, -3, 2]), torch.tensor([1, IGNORE, IGNORE, 2])
    results = []
    for labels, ignore_index in ((wrong, IGNORE), (ignored, IGNORE), (wrong, None)):
        loss = linear_cross_entropy(x, weight, labels, ignore_index=ignore_index)
        results.append((loss, *torch.autograd.grad(loss, (x, weight))))
    assert_equal(*results[:2])
    assert_equal(*results[1:])


def test_asks_for_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(MODULE, "choose_backend", lambda *args: asked.append(args[:4]))
    linear_cross_entropy(draw(2, 3), draw(5, 3), torch.tensor([1, 2]))
    assert asked == [("linear_cross_entropy", None, torch.device("cpu"), ("reference",))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x must be a tensor, got NoneType"),
        ({"x": torch.ones(2, 3).double()}, "x must be float16 or bfloat16 or float32, got float64"),
        ({"x": torch.tensor(1.0)}, "x must have shape (..., C), got ()"),
        ({"weight": torch.ones(5, 4)}, "weight must have shape (V, C) = (V, 3), got (5, 4)"),
        ({"weight": torch.ones(5, 3).half()}, "weight must be float32, got float16"),
        (
            {"weight": torch.ones(5, 3, device="meta")},
            "weight must be on the device of x, cpu, got meta",
        ),
        (
            {"labels": torch.ones(2, 3).long()},
            "labels must have shape that of x without its last dimension = (2,), got (2, 3)",
        ),
        ({"labels": torch.ones(2)}, "labels must be int64, got float32"),
        (
            {"labels": torch.ones(2, device="meta").long()},
            "labels must be on the device of x, cpu, got meta",
        ),
        (
            {"labels": torch.tensor([1, 5])},
            "labels must be from 0 to 4 or ignore_index -100, got 5",
        ),
        (
            {"labels": torch.tensor([-100, 1]), "ignore_index": -1},
            "labels must be from 0 to 4 or ignore_index -1, got -100",
        ),
        (
            {"labels": torch.tensor([-100, 1]), "ignore_index": None},
            "labels must be from 0 to 4, got -100",
        ),
        ({"ignore_index": 1.5}, "ignore_index must be an integer from -9223372036854775808 to"),
        ({"reduction": "max"}, 'reduction must be "mean", "sum" or "none", got \'max\''),
    ],
)
def test_errors_name_the_argument(change: dict, message: str) -> None:
    labels = torch.tensor([1, 2])
    arguments = {"x": torch.ones(2, 3), "weight": torch.ones(5, 3), "labels": labels} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_cross_entropy(**arguments)
