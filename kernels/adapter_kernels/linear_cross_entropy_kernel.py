"""The kernel of linear_cross_entropy, between the products of a chunk: a row of logits at a time.

One launch reads the logits that a matrix product left, gives the loss of every row, and puts the
gradient of the logits in their place, from which the next product makes dx or dweight.
"""

# the bodies of kernels are triton's language, which has no types for a checker
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch
from .linear_cross_entropy import HALF_SCALE, dx_dtype

# A chunk's logits. In bfloat16 128 MiB are 2,048 rows of LLaMA's V = 32,000. With C = 4,096 the
# two products of such a chunk are 2,000 and 256 tiles of 128 x 256, in 16 and 2 rounds of the 132
# multiprocessors of an H200, 95 and 97 % full; each takes 680 us at 790 TFLOP/s, in which its
# 262 MB of weight are read in 61 us. At the 8,300 tokens of the paper's batch, all of them
# labelled, 131 MB of logits, 68 MB of dx and at most 34 MB of a chunk's x and dx exist at a time,
# below 300 MB; all logits at once would be 531 MB, and twice that in float32.
CHUNK_BYTES = 2**27
# LLaMA 3's V = 128,256 would leave 522 rows, too few: these are 263 MB in bfloat16
CHUNK_ROWS = 1024
# rows of a product's tile
TILE_ROWS = 128
# columns of one tile
BLOCK = 4096
# below every finite logit
LOWEST = tl.constexpr(-3.4028234663852886e38)

Where = slice | Tensor


@triton.jit
def _tile(logits_ptr, columns, V):
    """Logits of a row in float32, minus infinity past its end."""
    return tl.load(logits_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, labels_ptr, rows_ptr, dloss_ptr, loss_ptr, V,
    BLOCK_V: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """One program: one row. A label outside of 0 to V - 1 has the loss 0 and the gradient 0.

    A NaN is in the sum of exponentials, whatever the maximum makes of it.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    # where the row's label, loss and gradient of the loss are
    at = row if rows_ptr is None else tl.load(rows_ptr + row)
    label = tl.load(labels_ptr + at)
    counts = (label >= 0) & (label < V)
    label = tl.where(counts, label, 0).to(tl.int32)
    # before the gradient takes its place
    picked = tl.load(logits_ptr + label, mask=counts, other=0.0).to(tl.float32)
    offsets = tl.arange(0, BLOCK_V)
    peak = tl.full((), LOWEST, tl.float32)
    sums = tl.zeros([BLOCK_V], dtype=tl.float32)
    for start in tl.range(0, V, BLOCK_V):
        z = _tile(logits_ptr, start + offsets, V)
        higher = tl.maximum(peak, tl.max(z, 0))
        sums = sums * tl.exp(peak - higher) + tl.exp(z - higher)
        peak = higher
    total = tl.sum(sums, 0)
    if loss_ptr is not None:
        # not lse - z: of large logits lse has lost what log(total) adds
        loss = (peak - picked) + tl.log(total)
        tl.store(loss_ptr + at, tl.where(counts, loss, 0.0))
    if GRADIENT:
        scale = 1.0 if dloss_ptr is None else tl.load(dloss_ptr + at)
        share = tl.div_rn(scale + tl.zeros_like(total), total)
        for start in tl.range(0, V, BLOCK_V):
            columns = start + offsets
            dz = tl.exp(_tile(logits_ptr, columns, V) - peak) * share
            dz -= tl.where(columns == label, scale, 0.0)
            dz = tl.where(counts, dz, 0.0).to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + columns, dz, mask=columns < V)


def cross_entropy_launch(
    logits: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    dloss: Tensor | None,
    loss: Tensor | None,
    gradient: bool,
) -> Launch:
    """The launch that fills the loss of every row of logits (n,V), and puts their gradient there.

    Args:
        logits: contiguous; overwritten by dloss * (softmax - onehot) if `gradient`.
        labels: (N,) int64; a row without a label of its own, from 0 to V - 1, counts for nothing.
        rows: (n,) int64, the places of the rows in the tensors of N; None where n = N.
        dloss: (N,) float32, None for 1 everywhere.
        loss: (N,) float32, None where it is not wanted.
        gradient: whether the logits are overwritten.
    """
    vocabulary = logits.shape[1]
    block = min(BLOCK, max(16, 1 << (vocabulary - 1).bit_length()))
    arguments = {
        "logits_ptr": logits,
        "labels_ptr": labels,
        "rows_ptr": rows,
        "dloss_ptr": dloss,
        "loss_ptr": loss,
        "V": vocabulary,
        "BLOCK_V": block,
        "GRADIENT": gradient,
    }
    return Launch(_cross_entropy_kernel, logits.shape[0], arguments, max(1, block // 512), 1)


def chunk_rows(vocabulary: int, element: int) -> int:
    """Rows whose logits, of so many bytes each, exist at a time."""
    rows = CHUNK_BYTES // max(vocabulary * element, 1)
    return max(CHUNK_ROWS, rows // TILE_ROWS * TILE_ROWS)


def _chunks(x: Tensor, weight: Tensor, rows: Tensor | None) -> Iterator[Where]:
    """Places of the rows that count, by chunks: all of them in order where `rows` is None."""
    count = x.shape[0] if rows is None else rows.numel()
    limit = chunk_rows(weight.shape[0], x.element_size())
    for start in range(0, count, limit):
        part = slice(start, start + limit)
        yield part if rows is None else rows[part]


def _run(
    logits: Tensor,
    labels: Tensor,
    where: Where,
    dloss: Tensor | None,
    loss: Tensor | None,
    gradient: bool,
) -> None:
    """Launch the kernel on the logits of the rows at `where`."""
    rows = None
    if isinstance(where, slice):
        labels = labels[where]
        dloss, loss = (None if x is None else x[where] for x in (dloss, loss))
    else:
        rows = where
    cross_entropy_launch(logits, labels, rows, dloss, loss, gradient).run()


def forward(
    x: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None, need_dx: bool
) -> tuple[Tensor, Tensor]:
    """As linear_cross_entropy_reference, of the rows at `rows` (n,) int64, or of all of them."""
    labels = labels.contiguous()
    loss = x.new_zeros(x.shape[0], dtype=torch.float32)
    dtype = dx_dtype(x)
    dx = torch.zeros_like(x, dtype=dtype) if need_dx else x.new_empty(0)
    scale = None
    if need_dx and dtype != x.dtype:
        scale = x.new_full(labels.shape, HALF_SCALE, dtype=torch.float32)
    for where in _chunks(x, weight, rows):
        logits = x[where] @ weight.t()
        _run(logits, labels, where, scale, loss, need_dx)
        if scale is not None:
            dx[where] = _product(logits, weight).div_(HALF_SCALE)
        elif need_dx:
            dx[where] = (logits @ weight).to(dtype)
        # before there are those of the next chunk
        del logits
    return loss, dx


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, of factors of half precision as they are where the device can."""
    if a.is_cuda and a.dtype == b.dtype and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def backward(
    dloss: Tensor, x: Tensor, weight: Tensor, labels: Tensor, rows: Tensor | None
) -> Tensor:
    """As linear_cross_entropy_dweight_reference, of the rows at `rows`, or of all of them.

    dloss is finite where no label counts.
    """
    labels = labels.contiguous()
    # the mean over many rows would leave the logits' gradients below what float16 holds
    largest = dloss.abs().amax().clamp(min=1e-30) / HALF_SCALE if len(dloss) else 1
    dloss = (dloss / largest).contiguous()
    dweight = weight.new_zeros(weight.shape, dtype=torch.float32)
    for where in _chunks(x, weight, rows):
        chunk = x[where]
        logits = chunk @ weight.t()
        _run(logits, labels, where, dloss, None, True)
        dweight += _product(logits.t(), chunk)
        del logits
    return (dweight * largest).to(weight.dtype)
