"""The kernel of swiglu: element by element, over rows of any stride."""

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


def rows_of(x: Tensor) -> Tensor:
    """x (..., F) as (rows, F): a view where rows are evenly spaced, as halves of a product are."""
    return x.reshape(-1, x.shape[-1]) if x.stride(-1) == 1 else x.contiguous().flatten(0, -2)


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


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """As swiglu_reference."""
    out = gate.new_empty(gate.shape)
    if out.numel():
        swiglu_launch(rows_of(gate), rows_of(up), out.view(-1, out.shape[-1])).run()
    return out
