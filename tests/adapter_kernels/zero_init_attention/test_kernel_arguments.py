"""Do tensors in every form become the arguments that the kernels name?"""

import pytest
import torch

from adapter_kernels.zero_init_attention import kernel_arguments
from adapter_kernels.zero_init_attention.layouts import Layout, Prompts
from tests.adapter_kernels.zero_init_attention.cases import int32


def test_strides_of_absent_dimensions_are_zero() -> None:
    strides = kernel_arguments.strides
    dense = torch.empty(2, 3, 5, 8)
    assert strides("q", dense, "bth") == {"stride_qb": 120, "stride_qt": 40, "stride_qh": 8}
    assert strides("q", dense[0], "bth") == {"stride_qb": 0, "stride_qt": 40, "stride_qh": 8}
    assert strides("q", None, "bth") == {"stride_qb": 0, "stride_qt": 0, "stride_qh": 0}
    expanded = torch.empty(1, 3, 5, 8).expand(2, 3, 5, 8)
    assert strides("k", expanded, "bsg")["stride_kb"] == 0


def test_rows_are_copied_only_where_they_are_not_aligned() -> None:
    aligned_rows = kernel_arguments.aligned_rows
    room = torch.randn(2, 3, 5, 24)
    for x in (room, room[..., 8:16], room[:, :, 1:2], room[:, :0], room.expand(7, 2, 3, 5, 24)):
        assert aligned_rows(x) is x
    odd = torch.randn(3, 5, 27)
    for x in (room[..., 1:9], odd[..., :8], odd[0, 0, 0].expand(2, 3, 8), room.mT):
        copy = aligned_rows(x)
        assert torch.equal(copy, x)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0
        with pytest.raises(AssertionError, match="q: rows are not aligned"):
            kernel_arguments.row_strides("q", x, "abcde")
    # four elements of float32 are 16 bytes, of float16 8
    assert aligned_rows(torch.randn(3, 12)[..., :8]).stride() == (12, 1)
    assert aligned_rows(torch.randn(3, 12).half()[..., :8]).stride() == (8, 1)


def test_prompts() -> None:
    q = torch.empty(2, 3, 6, 8)
    k, gate = torch.empty(4, 17, 2, 8), torch.empty(4, 6)
    found = kernel_arguments.prompt_arguments(q, Prompts(k, k, gate, int32(0, 1), None))
    assert (found["P"], found["A"], found["BLOCK_P"], found["MANY"]) == (17, 4, 16, True)
    assert (found["stride_pkb"], found["stride_gb"], found["stride_gh"]) == (272, 6, 1)
    shared = kernel_arguments.prompt_arguments(q.half(), Prompts(k[0], k[0], gate[0], None, None))
    assert (shared["stride_pkb"], shared["stride_gb"], shared["BLOCK_P"]) == (0, 0, 32)
    nothing = kernel_arguments.prompt_arguments(q, Prompts(None, None, None, None, None))
    assert nothing["prompt_k_ptr"] is None
    assert (nothing["P"], nothing["MANY"]) == (0, False)


def test_lengths_are_those_of_the_layout() -> None:
    q, k = torch.empty(2, 3, 6, 8), torch.empty(2, 5, 2, 8)
    dense = Layout(None, None, None, None, None, 0, 0, True)
    found = kernel_arguments.token_arguments(q, k, dense)
    assert (found["T"], found["S"], found["CAUSAL"]) == (3, 5, True)
    packed = Layout(None, None, int32(0, 2, 6), int32(0, 5, 9), None, 4, 5, False)
    found = kernel_arguments.token_arguments(q[0], k[0], packed)
    assert (found["T"], found["S"], found["CAUSAL"]) == (4, 5, False)
    assert kernel_arguments.batch_of(q[0], packed.cu_seqlens_q) == 2
    assert kernel_arguments.batch_of(q, None) == 2
    shape = kernel_arguments.shape_arguments(q, 2)
    assert shape == {"H": 6, "GROUP": 3, "HEAD_DIM": 8, "BLOCK_D": 16}
    assert [kernel_arguments.tiles_of(n, 16) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
