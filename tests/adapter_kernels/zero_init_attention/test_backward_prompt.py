"""Are sums over samples taken in a fixed order, in every form of a prompt, and cast once?"""

import pytest
import torch

from tests.adapter_kernels.tolerances import check_bitwise, check_identity
from tests.adapter_kernels.zero_init_attention.cases import int32
from tests.adapter_kernels.zero_init_attention.kernel_runs import DEVICE, needs_kernels

backward_prompt = pytest.importorskip("adapter_kernels.zero_init_attention.backward_prompt")
pytestmark = [pytest.mark.kernel, needs_kernels]


def summed(
    partial: torch.Tensor, rows: int | None, index: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    shape = partial.shape[2:] if rows is None else (rows, *partial.shape[2:])
    out = torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    backward_prompt.sum_launch(partial, out, index, rows is None).run()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums(dtype: torch.dtype) -> None:
    partial = torch.randn(5, 3, 11, 2, 53, device=DEVICE)
    index = int32(2, -1, 0, 2, 7).to(DEVICE)
    by_sample = partial.double().sum(1)
    bank = torch.stack([by_sample[2], torch.zeros_like(by_sample[0]), by_sample[[0, 3]].sum(0)])
    for rows, given, expected in (
        (None, None, by_sample.sum(0)),
        (5, None, by_sample),
        (3, index, bank),
    ):
        got = summed(partial, rows, given, dtype)
        check_identity("sum", got, expected.to(dtype), scale=8.0)
        check_bitwise("again", summed(partial, rows, given, dtype), got)


def test_nothing_sums_to_zero() -> None:
    empty = torch.empty(0, 2, 4, device=DEVICE)
    assert summed(empty, None, None, torch.float32).tolist() == [0.0] * 4
    assert backward_prompt.chunks_of(0) == 0
    assert backward_prompt.chunks_of(backward_prompt.PROMPT_ROWS + 1) == 2
