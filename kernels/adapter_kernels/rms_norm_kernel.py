"""The kernel of rms_norm: a row at a time, the residual added on the way."""

# the bodies of kernels are triton's language, which has no types for a checker
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

# wider rows than this take more than one pass
BLOCK = 4096


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


def rms_norm_launch(
    x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor, h: Tensor | None,
    rstd: Tensor, eps: float,
) -> Launch:  # fmt: skip
    """The launch that fills out, h where there is a residual, and rstd (...,1); all contiguous."""
    width = x.shape[-1]
    block = min(BLOCK, max(16, 1 << (width - 1).bit_length()))
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
