"""The kernels of rms_norm, forward and backward: a row at a time.

The residual is added on the way, and so is the gradient that reaches the sum from its other uses.
"""

# the bodies of kernels are triton's language, which has no types for a checker
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

# wider rows than this take more than one pass
BLOCK = 4096
# that share the rows where the weight has a gradient: a few for each multiprocessor, on every GPU
# the same, so that the sum over rows has one order
PROGRAMS = 256


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, h_ptr, rstd_ptr, C, eps,
    BLOCK_C: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """One program: one row. h = x + residual is rounded before it is normalised."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * C
    out_ptr += row * C
    if residual_ptr is not None:
        residual_ptr += row * C
        h_ptr += row * C
    offsets = tl.arange(0, BLOCK_C)
    square = tl.zeros([BLOCK_C], dtype=tl.float32)
    h = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in tl.range(0, C, BLOCK_C):
        columns = start + offsets
        inside = columns < C
        h = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            h += tl.load(residual_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            rounded = h.to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + columns, rounded, mask=inside)
            h = rounded.to(tl.float32)
        square += h * h
    rstd = 1 / tl.sqrt_rn(tl.sum(square, 0) / C + eps)
    tl.store(rstd_ptr + row, rstd)
    if ONE:
        # the row is still in registers
        weight = tl.load(weight_ptr + offsets, mask=offsets < C, other=0.0).to(tl.float32)
        out = (h * rstd * weight).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offsets, out, mask=offsets < C)
    else:
        source_ptr = x_ptr if residual_ptr is None else h_ptr
        for start in tl.range(0, C, BLOCK_C):
            columns = start + offsets
            inside = columns < C
            h = tl.load(source_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            out = (h * rstd * weight).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + columns, out, mask=inside)


@triton.jit
def _inputs(dout_ptr, h_ptr, at, inside):
    """A tile of dout and of h at offset `at` of their rows, in float32."""
    dout = tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return dout, tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _put_dx(dx_ptr, dh_ptr, at, inside, dout, h, weight, rstd, pull):
    """Store a tile of dx = rstd * (dout * weight - h * pull) + dh."""
    dx = rstd * (dout * weight - h * pull)
    if dh_ptr is not None:
        dx += tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_backward_kernel(
    dout_ptr, dh_ptr, h_ptr, weight_ptr, rstd_ptr, dx_ptr, parts_ptr, rows, each, C,
    BLOCK_C: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """One program: `each` rows of dx, one after the other, and its part of dweight over them.

    pull = rstd^2 * mean(dout * weight * h). Both dx and the parts may be absent.
    """
    pid = tl.program_id(0).to(tl.int64)
    first = pid * each
    # of one row there is no loop
    count = 1 if parts_ptr is None else tl.minimum(rows - first, each)
    offsets = tl.arange(0, BLOCK_C)
    if ONE:
        # a row, the weight and the sum stay in registers
        inside = offsets < C
        weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        part = tl.zeros([BLOCK_C], dtype=tl.float32)
        for i in tl.range(0, count):
            at = (first + i) * C + offsets
            dout, h = _inputs(dout_ptr, h_ptr, at, inside)
            rstd = tl.load(rstd_ptr + first + i)
            if dx_ptr is not None:
                pull = tl.sum(dout * weight * h, 0) / C * rstd * rstd
                _put_dx(dx_ptr, dh_ptr, at, inside, dout, h, weight, rstd, pull)
            if parts_ptr is not None:
                part += dout * h * rstd
        if parts_ptr is not None:
            tl.store(parts_ptr + pid * C + offsets, part, mask=inside)
    else:
        if dx_ptr is not None:
            for i in tl.range(0, count):
                row = (first + i) * C
                dot = tl.zeros([BLOCK_C], dtype=tl.float32)
                for start in tl.range(0, C, BLOCK_C):
                    columns = start + offsets
                    inside = columns < C
                    dout, h = _inputs(dout_ptr, h_ptr, row + columns, inside)
                    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
                    dot += dout * weight.to(tl.float32) * h
                rstd = tl.load(rstd_ptr + first + i)
                pull = tl.sum(dot, 0) / C * rstd * rstd
                for start in tl.range(0, C, BLOCK_C):
                    columns = start + offsets
                    inside = columns < C
                    dout, h = _inputs(dout_ptr, h_ptr, row + columns, inside)
                    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
                    at = row + columns
                    _put_dx(dx_ptr, dh_ptr, at, inside, dout, h, weight, rstd, pull)
        if parts_ptr is not None:
            # a sum over rows holds one tile of columns: the rows are read again for each
            for start in tl.range(0, C, BLOCK_C):
                columns = start + offsets
                inside = columns < C
                part = tl.zeros([BLOCK_C], dtype=tl.float32)
                for i in tl.range(0, count):
                    dout, h = _inputs(dout_ptr, h_ptr, (first + i) * C + columns, inside)
                    part += dout * h * tl.load(rstd_ptr + first + i)
                tl.store(parts_ptr + pid * C + columns, part, mask=inside)


def _block(width: int) -> int:
    """Columns of one tile."""
    return min(BLOCK, max(16, 1 << (width - 1).bit_length()))


def rms_norm_launch(
    x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor, h: Tensor | None,
    rstd: Tensor, eps: float,
) -> Launch:  # fmt: skip
    """The launch that fills out, h where there is a residual, and rstd (...,1); all contiguous."""
    width = x.shape[-1]
    block = _block(width)
    arguments = {
        "x_ptr": x,
        "residual_ptr": residual,
        "weight_ptr": weight,
        "out_ptr": out,
        "h_ptr": h,
        "rstd_ptr": rstd,
        "C": width,
        "eps": eps,
        "BLOCK_C": block,
        "ONE": width <= block,
    }
    return Launch(_rms_norm_kernel, x.numel() // max(width, 1), arguments, max(1, block // 512), 1)


def rms_norm_backward_launch(
    dout: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, dx: Tensor | None,
    parts: Tensor | None,
) -> Launch:  # fmt: skip
    """The launch that fills dx, and parts (programs,C) whose sum is dweight; all contiguous.

    Without parts a program has one row, else an equal share of them, the last perhaps less.
    """
    width = h.shape[-1]
    rows, tile = rstd.numel(), _block(width)
    # a wide row is read twice: of half a tile a thread holds little, and more programs fit
    block = tile if width <= tile else tile // 2
    each = 1 if parts is None else -(-rows // parts.shape[0])
    arguments = {
        "dout_ptr": dout,
        "dh_ptr": dh,
        "h_ptr": h,
        "weight_ptr": weight,
        "rstd_ptr": rstd,
        "dx_ptr": dx,
        "parts_ptr": parts,
        "rows": rows,
        "each": each,
        "C": width,
        "BLOCK_C": block,
        "ONE": width <= block,
    }
    grid = rows if parts is None else parts.shape[0]
    return Launch(_rms_norm_backward_kernel, grid, arguments, max(1, tile // 512), 1)


def forward(
    x: Tensor, weight: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As rms_norm_reference."""
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    out, h = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    rms_norm_launch(x, weight, residual, out, h, rstd, eps).run()
    return out, x.new_empty(0) if h is None else h, rstd


def backward(
    dout: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """As rms_norm_backward_reference."""
    dx = h.new_empty(h.shape if need_dx else 0)
    if not (need_dx or need_dweight) or h.numel() == 0:
        return dx, weight.new_zeros(weight.shape if need_dweight else 0)
    parts = None
    if need_dweight:
        rows = rstd.numel()
        # no program without a row: its part would be left unwritten
        programs = -(-rows // -(-rows // PROGRAMS))
        parts = weight.new_empty((programs, weight.numel()), dtype=torch.float32)
    dout, h, weight, rstd = (x.contiguous() for x in (dout, h, weight, rstd))
    # dh serves dx alone
    dh = dh.contiguous() if dh is not None and need_dx else None
    place = dx if need_dx else None
    rms_norm_backward_launch(dout, dh, h, weight, rstd, place, parts).run()
    dweight = weight.new_empty(0) if parts is None else parts.sum(0).to(weight.dtype)
    return dx, dweight
