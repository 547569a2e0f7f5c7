"""Is a prefix's gradient the sum over all that share it, however many programs sum it?"""

from dataclasses import replace

import pytest
import torch

from tests.adapter_kernels.zero_init_attention import cases
from tests.adapter_kernels.zero_init_attention.cases import int32, make_case
from tests.adapter_kernels.zero_init_attention.kernel_runs import (
    check_against_reference,
    needs_kernels,
    on_device,
)

backward_prefix = pytest.importorskip("adapter_kernels.zero_init_attention.backward_prefix")
pytestmark = [pytest.mark.kernel, needs_kernels]


@pytest.mark.parametrize("keys", [5, 71])
def test_more_sequences_than_one_program_sums(keys: int) -> None:
    """Nineteen sequences, three chunks, two of them without a sharer of prefix 2; long prefixes."""
    g, count = torch.Generator().manual_seed(keys), 19
    ends = [3 * b for b in range(count + 1)]
    case = make_case("none", "packed_prefix")
    index = [1, 0, -1, 1, 1, 2, 1, 0, *[1, 0, 0, -1, 1, 0, 1, 1], 0, 1, 0]
    case = replace(
        case,
        q=cases.normal(g, 3 * count, 6, 8),
        k=cases.normal(g, 3 * count, 2, 8),
        v=cases.normal(g, 3 * count, 2, 8),
        cu_seqlens_q=int32(*ends),
        cu_seqlens_k=int32(*ends),
        prefix_k=cases.normal(g, 3, keys, 2, 8),
        prefix_v=cases.normal(g, 3, keys, 2, 8),
        prefix_index=int32(*index),
        prefix_lengths=int32(keys, keys - 2, 1),
    )
    check_against_reference(on_device(case, torch.float32), "triton")


def test_chunks() -> None:
    assert backward_prefix.sequence_chunks(0, 3) == 0
    assert backward_prefix.sequence_chunks(backward_prefix.PREFIX_SEQUENCES + 1, 3) == 2
    # partial sums of every prefix: of many there are few, whoever uses which
    for sequences, prefixes in ((64, 2), (64, 64), (256, 64), (257, 5), (3, 1000)):
        chunks = backward_prefix.sequence_chunks(sequences, prefixes)
        assert chunks * prefixes <= max(backward_prefix.MOST_PARTIALS, prefixes)
        assert chunks * backward_prefix.sequences_of(sequences, prefixes) >= sequences
