"""The kernels of swiglu, forward and backward: element by element, over rows of any stride."""

# the bodies of kernels are triton's language, which has no types for a checker
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

BLOCK = 1024


@triton.jit
def _swiglu_kernel(
    gate_ptr, up_ptr, out_ptr, stride_gate, stride_up, F, blocks, BLOCK_F: tl.constexpr
):
    """One program: BLOCK_F elements of one row."""
    pid = tl.program_id(0)
    row, columns = (pid // blocks).to(tl.int64), pid % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < F
    gate = tl.load(gate_ptr + row * stride_gate + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + columns, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * F + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(
    dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, stride_dout, stride_gate, stride_up, F, blocks,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_F elements of one row, of the gradients that have a place."""
    pid = tl.program_id(0)
    row, columns = (pid // blocks).to(tl.int64), pid % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < F
    dout = tl.load(dout_ptr + row * stride_dout + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate + columns, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    if dgate_ptr is not None:
        up = tl.load(up_ptr + row * stride_up + columns, mask=inside, other=0.0).to(tl.float32)
        dgate = dout * up * s * (1 + gate * (1 - s))
        place = dgate_ptr + row * F + columns
        tl.store(place, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    if dup_ptr is not None:
        dup = dout * (gate * s)
        tl.store(dup_ptr + row * F + columns, dup.to(dup_ptr.dtype.element_ty), mask=inside)


def rows_of(x: Tensor) -> Tensor:
    """x (..., F) as (rows, F): a view where rows are evenly spaced, as halves of a product are."""
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1])


def swiglu_launch(gate: Tensor, up: Tensor, out: Tensor) -> Launch:
    """The launch that fills out, contiguous (rows, F), from gate and up (rows, F)."""
    rows, width = gate.shape
    blocks = -(-width // BLOCK)
    arguments = {
        "gate_ptr": gate,
        "up_ptr": up,
        "out_ptr": out,
        "stride_gate": gate.stride(0),
        "stride_up": up.stride(0),
        "F": width,
        "blocks": blocks,
        "BLOCK_F": BLOCK,
    }
    return Launch(_swiglu_kernel, rows * blocks, arguments, 4, 1)


def swiglu_backward_launch(
    dout: Tensor, gate: Tensor, up: Tensor, dgate: Tensor | None, dup: Tensor | None
) -> Launch:
    """The launch that fills dgate and dup, contiguous (rows, F), where they are asked for."""
    rows, width = gate.shape
    blocks = -(-width // BLOCK)
    arguments = {
        "dout_ptr": dout,
        "gate_ptr": gate,
        "up_ptr": up,
        "dgate_ptr": dgate,
        "dup_ptr": dup,
        "stride_dout": dout.stride(0),
        "stride_gate": gate.stride(0),
        "stride_up": up.stride(0),
        "F": width,
        "blocks": blocks,
        "BLOCK_F": BLOCK,
    }
    return Launch(_swiglu_backward_kernel, rows * blocks, arguments, 4, 1)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """As swiglu_reference."""
    out = gate.new_empty(gate.shape)
    if out.numel():
        swiglu_launch(rows_of(gate), rows_of(up), out.view(-1, out.shape[-1])).run()
    return out


def backward(
    dout: Tensor, gate: Tensor, up: Tensor, need_dgate: bool, need_dup: bool
) -> tuple[Tensor, Tensor]:
    """As swiglu_backward_reference."""
    dgate = gate.new_empty(gate.shape if need_dgate else 0)
    dup = up.new_empty(up.shape if need_dup else 0)
    if gate.numel() and (need_dgate or need_dup):
        rows = (rows_of(x) for x in (dout, gate, up))
        places = (rows_of(x) if x.numel() else None for x in (dgate, dup))
        swiglu_backward_launch(*rows, *places).run()
    return dgate, dup
