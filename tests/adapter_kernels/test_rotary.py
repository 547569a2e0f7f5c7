"""apply_rotary against transformers' and Meta's formulas."""

import importlib
import re

import pytest
import torch
from torch import Tensor

from adapter_kernels import apply_rotary
from tests.adapter_kernels.small_ops import (
    DTYPES,
    Spy,
    angles,
    assert_as_accurate_as_eager,
    assert_equal,
    draw,
    gradients,
)

OPS = torch.ops.adapter_kernels
LAYOUTS = (False, True)


def formula(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The rotation pair by pair, in the dtype of x."""
    half = x.shape[-1] // 2
    cos, sin = cos.to(x.dtype)[..., None, :], sin.to(x.dtype)[..., None, :]
    if interleaved:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@pytest.mark.parametrize("interleaved", LAYOUTS)
@pytest.mark.parametrize("batched", [False, True])
def test_gradcheck_in_float64(interleaved: bool, batched: bool) -> None:
    torch.manual_seed(0)
    q, k = draw(2, 3, 2, 6, dtype=torch.float64), draw(2, 3, 1, 6, dtype=torch.float64)
    cos, sin = (angle.double() for angle in angles(*((2, 3, 3) if batched else (3, 3))))
    assert torch.autograd.gradcheck(
        lambda q, k: OPS.apply_rotary(q, k, cos, sin, interleaved), (q, k)
    )


@pytest.mark.parametrize("interleaved", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_of_outputs_and_gradients(dtype: torch.dtype, interleaved: bool) -> None:
    torch.manual_seed(1)
    q, k = draw(2, 13, 6, 10, dtype=dtype), draw(2, 13, 3, 10, dtype=dtype)
    cos, sin = angles(2, 13, 5)
    assert_as_accurate_as_eager(
        lambda q, k: apply_rotary(q, k, cos, sin, interleaved=interleaved),
        lambda q, k: (formula(q, cos, sin, interleaved), formula(k, cos, sin, interleaved)),
        (q, k),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_are_transformers(dtype: torch.dtype) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = draw(2, 7, 4, 16, dtype=dtype), draw(2, 7, 2, 16, dtype=dtype)
    cos, sin = angles(2, 7, 8)

    def theirs(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        full = (torch.cat((angle, angle), -1).to(q.dtype) for angle in (cos, sin))
        return llama.apply_rotary_pos_emb(q, k, *full, unsqueeze_dim=2)

    assert_as_accurate_as_eager(
        lambda q, k: apply_rotary(q, k, cos, sin, interleaved=False), theirs, (q, k)
    )


def test_pairs_are_bitwise_metas_complex_product() -> None:
    q, k = draw(2, 7, 4, 16, grad=False), draw(2, 7, 2, 16, grad=False)
    cos, sin = angles(7, 8)
    turn = torch.complex(cos, sin)[:, None]
    expected = tuple(
        torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(3)
        for x in (q, k)
    )
    assert_equal(apply_rotary(q, k, cos, sin, interleaved=True), expected)


def test_layouts_agree_through_the_permutation_of_weight_rows() -> None:
    torch.manual_seed(2)
    heads, head_dim, width = 3, 10, 17
    x, weight = draw(2, 5, width, grad=False), draw(heads * head_dim, width, grad=False)
    # Meta's rows 2i and 2i + 1 of a head become transformers' rows i and i + D/2
    permuted = weight.view(heads, head_dim // 2, 2, width).transpose(1, 2).reshape_as(weight)
    cos, sin = angles(5, head_dim // 2)
    pairs, halves = ((x @ w.t()).unflatten(-1, (heads, head_dim)) for w in (weight, permuted))
    pairs, _ = apply_rotary(pairs, pairs, cos, sin, interleaved=True)
    halves, _ = apply_rotary(halves, halves, cos, sin, interleaved=False)
    expected = pairs.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(halves, expected, rtol=0, atol=4 * 2**-23 * 30)
    scores = torch.einsum("bthd,bshd->bhts", pairs, pairs)
    torch.testing.assert_close(
        torch.einsum("bthd,bshd->bhts", halves, halves), scores, rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize("interleaved", LAYOUTS)
def test_scores_depend_on_distance_only(interleaved: bool) -> None:
    q, k = (draw(1, 1, 1, 8, dtype=torch.float64, grad=False) for _ in range(2))
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)

    def score(i: int, j: int) -> Tensor:
        rotated = [
            OPS.apply_rotary(x, x, (p * frequencies)[None].cos(), (p * frequencies)[None].sin(), i_)
            for x, p, i_ in ((q, i, interleaved), (k, j, interleaved))
        ]
        return (rotated[0][0] * rotated[1][0]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-12, atol=1e-12)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


@pytest.mark.parametrize("interleaved", LAYOUTS)
def test_angles_with_and_without_batch(interleaved: bool) -> None:
    q, k, (cos, sin) = draw(3, 5, 2, 6), draw(3, 5, 1, 6), angles(5, 3)
    shared = apply_rotary(q, k, cos, sin, interleaved=interleaved)
    batched = (angle.expand(3, 5, 3) for angle in (cos, sin))
    for got, expected in zip(
        apply_rotary(q, k, *batched, interleaved=interleaved), shared, strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=4 * 2**-23 * 4)


@pytest.mark.parametrize("interleaved", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_are_free_and_inputs_stay(dtype: torch.dtype, interleaved: bool) -> None:
    # an odd offset and odd strides, which a complex view would refuse
    base = draw(3, 5, 2, 8, dtype=dtype, grad=False).flatten()
    x = torch.as_strided(base, (2, 5, 2, 6), (77, 13, 6, 1), 1)
    kept, (cos, sin) = base.clone(), angles(5, 3)
    got = apply_rotary(x, x, cos, sin, interleaved=interleaved)
    assert_equal(got, apply_rotary(*(x.contiguous(),) * 2, cos, sin, interleaved=interleaved))
    assert torch.equal(base, kept)


def test_computes_no_gradient_that_nobody_asked_for() -> None:
    cos, sin = angles(5, 3)
    for grads in ((True, False), (False, True), (True, True)):
        q, k = (draw(2, 5, 2, 6, grad=grad) for grad in grads)
        with Spy() as spy:
            outs = apply_rotary(q, k, cos, sin, interleaved=True)
            sum(out.sum() for out in outs).backward()
        name, args, out = spy.calls[-1]
        assert name == "apply_rotary_backward"
        assert [dout is not None for dout in args[:2]] == list(grads)
        assert [grad.numel() for grad in out] == [120 * grad for grad in grads]
        assert [q.grad is not None, k.grad is not None] == list(grads)


def test_keeps_only_the_angles() -> None:
    q, (cos, sin) = draw(2, 5, 2, 6), angles(5, 3)
    with torch.no_grad():
        assert apply_rotary(q, q, cos, sin, interleaved=True)[0].grad_fn is None
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), id):
        apply_rotary(q, q, cos, sin, interleaved=True)
    assert saved == [cos.data_ptr(), sin.data_ptr()]


def test_one_output_used() -> None:
    q, k, (cos, sin) = draw(2, 5, 2, 6), draw(2, 5, 1, 6), angles(5, 3)
    rotated, _ = apply_rotary(q, k, cos, sin, interleaved=False)
    dq, dk = torch.autograd.grad(rotated, (q, k), rotated.detach(), allow_unused=True)
    torch.testing.assert_close(dq, q.detach(), rtol=1e-5, atol=1e-6)
    assert dk is None


def test_second_derivative_is_refused() -> None:
    q, (cos, sin) = draw(2, 5, 2, 6), angles(5, 3)
    rotated, _ = apply_rotary(q, q, cos, sin, interleaved=True)
    with pytest.raises(RuntimeError, match="apply_rotary is differentiable once"):
        torch.autograd.grad(rotated.sum(), q, create_graph=True)


@pytest.mark.parametrize("interleaved", LAYOUTS)
def test_opcheck(interleaved: bool) -> None:
    q, k, (cos, sin) = draw(2, 3, 2, 6), draw(2, 3, 1, 6), angles(3, 3)
    torch.library.opcheck(OPS.apply_rotary.default, (q, k, cos, sin, interleaved))
    if interleaved:
        arguments = (q.detach(), None, cos, sin, interleaved)
        torch.library.opcheck(OPS.apply_rotary_backward.default, arguments)


@pytest.mark.parametrize("interleaved", LAYOUTS)
def test_compiles_in_one_graph(interleaved: bool) -> None:
    def step(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary(q, k, cos, sin, interleaved=interleaved)

    q, k, (cos, sin) = draw(2, 3, 2, 6), draw(2, 3, 1, 6), angles(3, 3)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, cos, sin)
    plain = step(q, k, cos, sin)
    assert_equal(compiled, plain)
    assert_equal(gradients(compiled, (q, k)), gradients(plain, (q, k)))


@pytest.mark.parametrize("shape", [(0, 3, 2, 6), (2, 0, 2, 6), (2, 3, 0, 6)])
def test_rotary_of_empty_inputs(shape: tuple[int, ...]) -> None:
    for interleaved in LAYOUTS:
        q, (cos, sin) = draw(*shape), angles(shape[1], 3)
        rotated = apply_rotary(q, q, cos, sin, interleaved=interleaved)
        assert [out.shape for out in rotated] == [shape, shape]
        assert gradients(rotated, (q,))[0].shape == shape


def test_asks_for_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    module = importlib.import_module("adapter_kernels.rotary")
    monkeypatch.setattr(module, "choose_backend", lambda *args: asked.append(args[:4]))
    apply_rotary(**rotary_arguments())
    assert asked == [("apply_rotary", None, torch.device("cpu"), ("reference",))]


def rotary_arguments() -> dict:
    cos, sin = angles(3, 2)
    q, k = draw(2, 3, 4, 4, grad=False), draw(2, 3, 1, 4, grad=False)
    return {"q": q, "k": k, "cos": cos, "sin": sin, "interleaved": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": 1}, "q must be a tensor, got int"),
        ({"q": torch.ones(2, 3, 4)}, "q must have shape (B, T, H, D), got (2, 3, 4)"),
        ({"q": torch.ones(2, 3, 4, 4).double()}, "q must be float16 or bfloat16 or float32, got"),
        (
            {"k": torch.ones(2, 5, 1, 4)},
            "k must have shape (B, T, G, D) = (2, 3, G, 4), got (2, 5, 1, 4)",
        ),
        ({"k": torch.ones(2, 3, 1, 4).half()}, "k must be float32, got float16"),
        (
            {"k": torch.ones(2, 3, 1, 4, device="meta")},
            "k must be on the device of q, cpu, got meta",
        ),
        (
            {"q": torch.ones(2, 3, 4, 5), "k": torch.ones(2, 3, 1, 5)},
            "q must have an even head_dim D, got 5",
        ),
        (
            {"cos": torch.ones(3, 4)},
            "cos must have shape (T, D/2) = (3, 2) or (B, T, D/2) = (2, 3, 2), got (3, 4)",
        ),
        (
            {"sin": torch.ones(1, 3, 2)},
            "sin must have shape (T, D/2) = (3, 2) or (B, T, D/2) = (2, 3, 2), got (1, 3, 2)",
        ),
        ({"cos": torch.ones(3, 2).long()}, "cos must be float16 or bfloat16 or float32, got int64"),
        (
            {"sin": torch.ones(3, 2, device="meta")},
            "sin must be on the device of q, cpu, got meta",
        ),
    ],
)
def test_rotary_errors_name_the_argument(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_rotary(**rotary_arguments() | change)
