"""What does the forward launcher hand to its kernel, and what does the prompt's own kernel add?"""

import math

import pytest
import torch

from adapter_kernels import gated_prompt_attention
from adapter_kernels.zero_init_attention.configs import TileConfig
from adapter_kernels.zero_init_attention.layouts import Layout, Prefix, Prompts
from tests.adapter_kernels.tolerances import check_identity, largest
from tests.adapter_kernels.zero_init_attention.cases import FORMS, make_case
from tests.adapter_kernels.zero_init_attention.kernel_runs import needs_kernels, on_device

forward = pytest.importorskip("adapter_kernels.zero_init_attention.forward")
DENSE = Layout(None, None, None, None, None, 0, 0, True)
NOTHING = Prompts(None, None, None, None, None)


@pytest.mark.parametrize(
    ("scale", "sign", "positive"), [(0.5, 1, 0.5), (-0.5, -1, 0.5), (0.0, 0, 1.0)]
)
def test_the_kernel_gets_a_positive_scale(scale: float, sign: int, positive: float) -> None:
    q, lse = torch.empty(2, 37, 4, 8), torch.empty(2, 4, 37)
    config = TileConfig(16, 32, 4, 2)
    launch = forward.forward_launch(q, q, q, NOTHING, Prefix(), DENSE, scale, q, lse, config)
    assert launch.arguments["SIGN"] == sign
    assert math.isclose(launch.arguments["scale_log2"], positive * math.log2(math.e))
    # three tiles of 16 rows, two samples, four heads
    assert launch.grid == 3 * 2 * 4
    assert (launch.num_warps, launch.num_stages) == (4, 2)


@pytest.mark.kernel
@needs_kernels
@pytest.mark.parametrize("layout", ["causal", "packed"])
@pytest.mark.parametrize("form", FORMS[1:])
def test_prompt_alone_equals_the_reference(form: str, layout: str) -> None:
    case = on_device(make_case(form, layout), torch.float32)
    base = torch.randn_like(case.q)
    shared = {
        "scale": case.scale,
        "adapter_index": case.adapter_index,
        "prompt_lengths": case.prompt_lengths,
        "cu_seqlens_q": case.cu_seqlens_q,
    }
    results = []
    for backend in ("triton", "reference"):
        for out in (None, base):
            result = gated_prompt_attention(
                case.q, *case.prompts[:3], **shared, out=out, backend=backend
            )
            leaves = [case.q, *(x for x in case.prompts[:3] if x is not None)]
            dout = torch.ones_like(result) * torch.arange(8, device=result.device)
            results.append((result, *torch.autograd.grad(result, leaves, dout)))
    for got, expected in zip(results[:2], results[2:], strict=True):
        for name, one, other in zip(("out", "dq", "dk", "dv", "dg"), got, expected, strict=True):
            check_identity(name, one, other, scale=8 * max(1.0, largest(other)))
