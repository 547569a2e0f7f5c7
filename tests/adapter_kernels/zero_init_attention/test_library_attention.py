"""Does torch's own attention give the contract's numbers, whatever the diagonal and the sizes?"""

import pytest
import torch
from torch import Tensor

from adapter_kernels.zero_init_attention.library_attention import (
    LIBRARIES,
    attend,
    attend_backward,
)
from tests.adapter_kernels.tolerances import check_bitwise, check_identity, largest

CPU = LIBRARIES["cpu"]


def formula(
    q: Tensor, k: Tensor, v: Tensor, offset: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Row i sees keys j <= i + offset, or all; rows without keys have 0 and -inf."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, 2) for x in (k, v))
    s = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if offset is not None:
        i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
        s = s.masked_fill(j > i + offset, -torch.inf)
    lse = s.logsumexp(-1) if k.shape[1] else s.new_full(s.shape[:-1], -torch.inf)
    p = (s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return torch.einsum("bhts,bshd->bthd", p, v), lse


CASES = [
    (5, 5, 0), (5, 9, 4), (9, 5, -4), (5, 9, None), (9, 5, None), (5, 9, 0), (5, 9, 7),
    (5, 9, 20), (5, 9, -5), (5, 9, -9), (9, 5, -2), (9, 3, 1), (1, 7, 6), (5, 0, -5), (5, 0, None),
    (0, 5, 5), (37, 53, 16),
]  # fmt: skip


@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize(("tokens", "keys", "offset"), CASES)
def test_forward_and_backward(tokens: int, keys: int, offset: int | None, groups: int) -> None:
    g = torch.Generator().manual_seed(1)
    q = torch.randn(2, tokens, 6, 8, generator=g)
    k, v = (torch.randn(2, keys, groups, 8, generator=g) for _ in "kv")
    out, lse = attend(q, k, v, offset, 0.4, CPU)
    doubles = [x.double().requires_grad_() for x in (q, k, v)]
    true_out, true_lse = formula(*doubles, offset, 0.4)
    blind = true_lse == -torch.inf
    check_bitwise("rows without keys", lse == -torch.inf, blind)
    check_identity("out", out, true_out.detach())
    check_identity("lse", lse.masked_fill(blind, 0), true_lse.detach().masked_fill(blind, 0))
    dout = torch.randn(out.shape, generator=g)
    found = attend_backward(dout, q, k, v, out, lse, offset, 0.4, CPU)
    expected = torch.autograd.grad(true_out, doubles, dout.double(), allow_unused=True)
    for name, grad, truth in zip(("dq", "dk", "dv"), found, expected, strict=True):
        truth = torch.zeros_like(grad).double() if truth is None else truth.nan_to_num(0.0)
        check_identity(name, grad, truth, scale=max(largest(truth), largest(dout)))


def test_a_diagonal_off_the_corner_makes_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls merged through their lse: nothing of the size tokens x keys is ever made."""
    sizes: list[int] = []
    monkeypatch.setattr(torch, "logaddexp", _recording(torch.logaddexp, sizes))
    q, k = torch.randn(1, 300, 1, 8), torch.randn(1, 500, 1, 8)
    attend(q, k, k, 200, 0.4, CPU)
    assert sizes == [300]


def _recording(function: object, sizes: list[int]) -> object:
    def wrapper(*args: Tensor) -> Tensor:
        result = function(*args)  # pyright: ignore[reportCallIssue]
        sizes.append(result.numel())
        return result

    return wrapper


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_lse_in_float32(dtype: torch.dtype) -> None:
    q = torch.randn(2, 9, 4, 16).to(dtype)
    out, lse = attend(q, q, q, 0, 0.25, CPU)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    truth, true_lse = formula(q.double(), q.double(), q.double(), 0, 0.25)
    check_identity("out", out, truth.to(dtype))
    check_identity("lse", lse, true_lse.float(), scale=64 * largest(true_lse))
