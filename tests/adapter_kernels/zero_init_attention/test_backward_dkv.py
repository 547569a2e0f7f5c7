"""Does the kernel of keys fill every key's gradient, and only those that are asked for?"""

import pytest
import torch

from adapter_kernels.zero_init_attention import reference_launch
from adapter_kernels.zero_init_attention.configs import tile
from adapter_kernels.zero_init_attention.layouts import Layout, Prefix, Prompts
from tests.adapter_kernels.tolerances import check_identity
from tests.adapter_kernels.zero_init_attention.cases import make_case
from tests.adapter_kernels.zero_init_attention.kernel_runs import DEVICE, needs_kernels, on_device

backward_dkv = pytest.importorskip("adapter_kernels.zero_init_attention.backward_dkv")
pytestmark = [pytest.mark.kernel, needs_kernels]
NOTHING = Prompts(None, None, None, None, None)


@pytest.mark.parametrize("layout", ["causal", "padded", "packed"])
@pytest.mark.parametrize("asked", [(True, True), (True, False), (False, True)])
def test_gradients_of_keys(layout: str, asked: tuple[bool, bool]) -> None:
    case = on_device(make_case("none", layout), torch.float32)
    q, k, v = (x.detach() for x in (case.q, case.k, case.v))
    bounds = (case.key_starts, case.key_lengths, case.cu_seqlens_q, case.cu_seqlens_k, None)
    given = Layout(*bounds, *case.longest(), case.causal)
    wide = (q.double(), k.double(), v.double(), NOTHING, Prefix(), given, case.scale)
    out, lse, _ = reference_launch.attention(*wide)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    # delta = rowsum(dO o out), as the query kernel leaves it
    delta = (dout.double() * out).sum(-1).transpose(-1, -2).float().contiguous()
    needs = (False, *asked, *[False] * 5)
    _, *expected = reference_launch.attention_backward(dout.double(), None, out, lse, *wide, needs)
    dk, dv = (
        torch.full_like(x, float("nan")) if one else None
        for x, one in zip((k, v), asked, strict=True)
    )
    lse, config = lse.float(), tile(80, "backward_dkv_grouped", 8, torch.float32)
    backward_dkv.key_launch(
        q, k, v, given, case.scale, dout, lse, delta if asked[0] else None, dk, dv, config
    ).run()
    for name, got, wanted in zip(("dk", "dv"), (dk, dv), expected, strict=False):
        if got is not None:
            check_identity(name, got, wanted, scale=30.0)
