"""What does the query kernel leave for the key kernel, and what does it skip?"""

import pytest
import torch

from adapter_kernels.zero_init_attention import reference_launch
from adapter_kernels.zero_init_attention.configs import tile
from adapter_kernels.zero_init_attention.layouts import Layout, Prefix, Prompts
from tests.adapter_kernels.tolerances import check_identity, largest
from tests.adapter_kernels.zero_init_attention.cases import make_case
from tests.adapter_kernels.zero_init_attention.kernel_runs import DEVICE, needs_kernels, on_device

backward_dq = pytest.importorskip("adapter_kernels.zero_init_attention.backward_dq")
pytestmark = [pytest.mark.kernel, needs_kernels]


@pytest.mark.parametrize("many", [False, True])
def test_delta_and_the_prompts_statistics(many: bool) -> None:
    """delta = rowsum(P o dP) - dlse of the tokens; of a long prompt its own lse and delta_p."""
    case = on_device(make_case("shared", "causal"), torch.float32)
    q, k, v = (x.detach() for x in (case.q, case.k, case.v))
    rows = 40 if many else 3
    prompt_k, prompt_v = (torch.randn(rows, 2, 8, device=DEVICE) for _ in "kv")
    gate = torch.randn(6, device=DEVICE)
    prompts = Prompts(prompt_k, prompt_v, gate, None, None)
    layout = Layout(None, None, None, None, None, 0, 0, True)
    doubled = Prompts(prompt_k.double(), prompt_v.double(), gate, None, None)
    out, lse, _ = reference_launch.attention(
        q.double(), k.double(), v.double(), doubled, Prefix(), layout, case.scale
    )
    dout, dlse = torch.randn_like(q), torch.randn(3, 6, 5, device=DEVICE)
    delta, dq = torch.full_like(dlse, float("nan")), torch.full_like(q, float("nan"))
    statistics = (torch.full_like(dlse, float("nan")), torch.full_like(dlse, float("nan")))
    config = tile(80, "backward_dq", 8, torch.float32)
    backward_dq.query_launch(
        q, k, v, prompts, Prefix(), layout, case.scale, out.float(), dout, lse.float(), dlse, delta,
        dq, statistics if many else None, config,
    ).run()  # fmt: skip
    own = out - _prompt_out(q, doubled, case.scale)[0]
    expected = torch.einsum("bthd,bthd->bht", dout.double(), own) - dlse
    check_identity("delta", delta, expected, scale=8 * largest(dout) * largest(out))
    assert bool(dq.isfinite().all())
    if many:
        _, prompt_lse, delta_p = _prompt_out(q, doubled, case.scale, dout)
        check_identity("lse", statistics[0], prompt_lse * 1.4426950408889634, scale=8.0)
        check_identity("delta_p", statistics[1], delta_p, scale=8 * largest(dout))
    else:
        assert bool(statistics[0].isnan().all())


def _prompt_out(
    q: torch.Tensor, prompts: Prompts, scale: float, dout: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    assert prompts.k is not None
    assert prompts.v is not None
    assert prompts.gate is not None
    k, v = (x.repeat_interleave(3, 1) for x in (prompts.k, prompts.v))
    s = torch.einsum("bthd,phd->bhtp", q.double(), k) * scale
    ungated = torch.einsum("bhtp,phd->bthd", s.softmax(-1), v)
    if dout is None:
        return (ungated * prompts.gate[:, None],)
    return (
        ungated, s.logsumexp(-1), torch.einsum("bthd,bthd->bht", dout.double(), ungated)
    )  # fmt: skip
