"""A run's random state and threads do not leak into its caller's."""

import pytest
import torch

from llama_adapter.seeded import seeded

CPU = torch.device("cpu")


def test_the_same_numbers_inside_and_the_callers_own_afterwards() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with seeded(11, CPU):
        first = torch.rand(4)
    with seeded(11, CPU):
        assert torch.equal(torch.rand(4), first)
    assert torch.equal(torch.rand(4), expected)


def test_threads_come_back_after_an_error_too() -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        with seeded(1, CPU, threads=before + 1):
            raise KeyError(torch.get_num_threads())

    with pytest.raises(KeyError, match=str(before + 1)):
        fail()
    assert torch.get_num_threads() == before
