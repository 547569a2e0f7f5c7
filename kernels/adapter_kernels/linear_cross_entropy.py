"""The loss of a language model's head, without its logits in memory.

In reading order: the equation and its analytic backward in plain torch, the torch.library ops, the
public function. Rows whose label is ignored are never multiplied with the weight; the others go
through in chunks. The gradient of x is taken while a chunk's logits exist, so that a frozen head
costs two products; only the gradient of the weight computes them again.
"""

from typing import Any

import torch
from torch import Tensor

from .backend import LIBRARY, choose_backend, define, exact, runs_kernels
from .checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_integer,
    check_shape,
    check_values,
)

# on a CPU a chunk's logits fit in a cache, but a product of fewer rows would mostly read the weight
CHUNK_ELEMENTS = 2**20
CHUNK_ROWS = 128
# probabilities below 6e-8 are 0 in float16, though a scaled loss makes them count: they are
# multiplied by this before they are rounded
HALF_SCALE = 2.0**14


def dx_dtype(x: Tensor) -> torch.dtype:
    """Of dx until the gradient of the loss arrives; that may scale what float16 cannot hold."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _labelled(labels: Tensor, vocabulary: int, ignore_index: int | None) -> Tensor:
    """Mark the rows that count."""
    inside = (labels >= 0) & (labels < vocabulary)
    return inside if ignore_index is None else inside & (labels != ignore_index)


def _rows(labels: Tensor, vocabulary: int, ignore_index: int | None) -> Tensor:
    """The places of the rows that count; their number is known on the host only."""
    return _labelled(labels, vocabulary, ignore_index).nonzero().squeeze(1)


def _chunks(labels: Tensor, vocabulary: int, ignore_index: int | None) -> tuple[Tensor, ...]:
    """The places of the rows that count, by chunks."""
    rows = _rows(labels, vocabulary, ignore_index)
    if rows.numel() == 0:
        return ()
    return rows.split(max(CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary))


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int | None, need_dx: bool
) -> tuple[Tensor, Tensor]:
    """Return (loss, dx) of each row, 0 where its label is ignored.

    With z = x weight^T:
        loss = log sum exp(z) - z[label]
        dx = d loss / d x = (softmax(z) - onehot(label)) weight
    The products are in the dtype of x, the rest in at least float32, as is dx of x in float16; dx
    has size 0 if not needed.
    """
    loss = x.new_zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    dx = torch.zeros_like(x, dtype=dx_dtype(x)) if need_dx else x.new_empty(0)
    for rows in _chunks(labels, weight.shape[0], ignore_index):
        label = labels[rows].unsqueeze(1)
        logits = (x[rows] @ weight.t()).to(loss.dtype)
        picked = logits.gather(1, label)
        peak = logits.amax(1, keepdim=True)
        total = logits.sub_(peak).exp_().sum(1, keepdim=True)
        # not lse - z: of large logits lse has lost what log(total) adds
        loss[rows] = (peak - picked + total.log()).squeeze(1)
        if need_dx:
            dlogits = logits.div_(total).scatter_add_(1, label, -torch.ones_like(picked))
            if x.dtype == torch.float16:
                scaled = dlogits.mul_(HALF_SCALE).half().float()
                dx[rows] = (scaled @ weight.float()).div_(HALF_SCALE)
            else:
                dx[rows] = (dlogits.to(x.dtype) @ weight).to(x.dtype)
    return loss, dx


def linear_cross_entropy_dweight_reference(
    dloss: Tensor, x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int | None
) -> Tensor:
    """Return dweight = (softmax(z) - onehot(label))^T (dloss * x), accumulated like dloss."""
    dweight = torch.zeros_like(weight, dtype=dloss.dtype)
    for rows in _chunks(labels, weight.shape[0], ignore_index):
        chunk, scale = x[rows], dloss[rows].unsqueeze(1)
        dlogits = (chunk @ weight.t()).to(dloss.dtype).softmax(1)
        dlogits.scatter_add_(1, labels[rows].unsqueeze(1), dlogits.new_full(scale.shape, -1.0))
        dweight.addmm_(dlogits.t(), scale * chunk)
    return dweight.to(weight.dtype)


def _forward(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int | None, need_dx: bool
) -> tuple[Tensor, Tensor]:
    """The kernel where it runs, else the reference."""
    with exact(x):
        if not runs_kernels(x):
            return linear_cross_entropy_reference(x, weight, labels, ignore_index, need_dx)
        from .linear_cross_entropy_kernel import forward

        rows = None if ignore_index is None else _rows(labels, weight.shape[0], ignore_index)
        return forward(x, weight, labels, rows, need_dx)


def _forward_fake(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int | None, need_dx: bool
) -> tuple[Tensor, Tensor]:
    loss = x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    return loss, torch.empty_like(x, dtype=dx_dtype(x)) if need_dx else x.new_empty(0)


def _dweight(
    dloss: Tensor, x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int | None
) -> Tensor:
    """The kernel where it runs, else the reference; contiguous."""
    with exact(x):
        if not runs_kernels(x):
            given = (dloss, x, weight, labels, ignore_index)
            return linear_cross_entropy_dweight_reference(*given).contiguous()
        from .linear_cross_entropy_kernel import backward

        counts = _labelled(labels, weight.shape[0], ignore_index)
        rows = None if ignore_index is None else counts.nonzero().squeeze(1)
        return backward(dloss.masked_fill(~counts, 0), x, weight, labels, rows)


def _dweight_fake(
    dloss: Tensor, x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int | None
) -> Tensor:
    return weight.new_empty(weight.shape)


define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor labels, int? ignore_index, bool need_dx) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
define(
    "linear_cross_entropy_dweight(Tensor dloss, Tensor x, Tensor weight, Tensor labels, "
    "int? ignore_index) -> Tensor",
    _dweight,
    _dweight_fake,
)
_forward_op = torch.ops.adapter_kernels.linear_cross_entropy.default
_dweight_op = torch.ops.adapter_kernels.linear_cross_entropy_dweight.default


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor, int | None, bool],
    output: tuple[Tensor, Tensor],
) -> None:
    x, weight, labels, ignore_index, need_dx = inputs
    dx = output[1]
    assert need_dx or not x.requires_grad
    frozen = not weight.requires_grad
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(dx)
    ctx.save_for_backward(dx, labels, *(() if frozen else (x, weight)))
    ctx.vocabulary, ctx.ignore_index, ctx.dtype = weight.shape[0], ignore_index, x.dtype


def _backward(
    ctx: Any, dloss: Tensor | None, _ddx: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy is differentiable once: call backward without create_graph"
        )
    need_dx, need_dweight, *_ = ctx.needs_input_grad
    dx, labels, *rest = ctx.saved_tensors
    if dloss is None:
        return None, None, None, None, None
    dweight = _dweight_op(dloss, *rest, labels, ctx.ignore_index) if need_dweight else None
    if need_dx:
        # it may be NaN where nothing counts, and 0 times that is
        dloss = dloss.masked_fill(~_labelled(labels, ctx.vocabulary, ctx.ignore_index), 0)
        # rounded as it is written: no tensor of float32 in between
        dx = torch.mul(dx, dloss.unsqueeze(1), out=torch.empty_like(dx, dtype=ctx.dtype))
    return dx if need_dx else None, dweight, None, None, None


torch.library.register_autograd(
    "adapter_kernels::linear_cross_entropy", _backward, setup_context=_setup_context, lib=LIBRARY
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of labels under softmax(x weight^T), without storing the logits.

        loss[i] = log sum_v exp(x[i] . weight[v]) - x[i] . weight[labels[i]]

    Rows whose label is `ignore_index` cost nothing and count for nothing: "mean" divides by the
    number of the others. A batch without a single label has the loss 0, with gradients of zero.
    Products are in the dtype of x, everything after them in float32, with autocast or without.
    Differentiable in x and weight; no gradient is computed for a frozen one. Where x has a gradient
    it is computed with the loss, and kept; so is x where the weight has one. Of x in float16 it is
    kept in float32, as a scaled loss counts on numbers that float16 does not hold. At most
    max(2^20, 128 V) logits exist at a time, on CUDA 1,024 rows of them or 128 MiB where that is
    more.

    Args:
        x: (..., C), float16, bfloat16 or float32.
        weight: (V, C), like x.
        labels: (...), int64, from 0 to V - 1, or `ignore_index`.
        ignore_index: the label of rows that do not count; None where every row counts. On CUDA
            the others must be told from them on the host, which waits for the GPU; None does not.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss in nats, float32: a scalar, or (...) for "none", 0 where ignored.

    Raises:
        ValueError: a shape, dtype, device or reduction is not as above, or, on the CPU, a label is
            out of range (on CUDA its row is ignored).

    Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models.
    """
    check_dtype("x", x, FLOATS)
    if x.dim() == 0:
        raise ValueError("x must have shape (..., C), got ()")
    check_shape("weight", weight, "(V, C)", (None, x.shape[-1]))
    check_dtype("weight", weight, (x.dtype,))
    check_device("weight", weight, "x", x)
    check_shape("labels", labels, "that of x without its last dimension", tuple(x.shape[:-1]))
    check_dtype("labels", labels, (torch.int64,))
    check_device("labels", labels, "x", x)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    vocabulary, ignored = weight.shape[0], ""
    if ignore_index is not None:
        check_integer("ignore_index", ignore_index, -(2**63), 2**63 - 1)
        ignored = f" or ignore_index {ignore_index}"

    def accept(label: Tensor) -> Tensor:
        inside = _labelled(label, vocabulary, None)
        return inside if ignore_index is None else inside | (label == ignore_index)

    check_values("labels", labels, f"from 0 to {vocabulary - 1}{ignored}", accept)
    able = ("triton",) if runs_kernels(x) else ("reference",)
    choose_backend("linear_cross_entropy", None, x.device, able, x, weight)
    need_dx = torch.is_grad_enabled() and x.requires_grad
    rows, flat = x.reshape(labels.numel(), x.shape[-1]), labels.reshape(-1)
    loss, _ = _forward_op(rows, weight, flat, ignore_index, need_dx)
    if reduction == "none":
        return loss.view(labels.shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / _labelled(flat, vocabulary, ignore_index).sum().clamp(min=1)
