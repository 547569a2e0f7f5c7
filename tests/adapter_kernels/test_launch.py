"""Does a launch start its kernel with its arguments, count it, and do nothing for an empty grid?"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from adapter_kernels import launch


class Kernel:
    """Stands in for a jitted function."""

    __name__ = "kernel"

    def __init__(self) -> None:
        self.started: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.started.append((grid, arguments))


Z = torch.randn(3)


@pytest.fixture(autouse=True)
def no_launch_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "counts", type(launch.counts)())


def test_a_launch_runs_and_is_counted() -> None:
    kernel = Kernel()
    for _ in range(2):
        launch.Launch(kernel, 7, {"x": 3, "y": None, "z": Z}, 4, 2).run()
    expected = {"x": 3, "y": None, "z": Z, "num_warps": 4, "num_stages": 2}
    assert kernel.started == [((7,), expected)] * 2
    assert launch.counts == {"kernel": 2}


def test_the_device_is_that_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device: without a guard, tensors of another one are lost."""
    asked: list[torch.Tensor] = []

    def device_of(x: torch.Tensor) -> Any:
        asked.append(x)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    launch.Launch(Kernel(), 7, {"y": None, "z": Z}, 4, 2).run()
    assert len(asked) == 1
    assert asked[0] is Z


def test_an_empty_grid_starts_nothing() -> None:
    kernel = Kernel()
    launch.Launch(kernel, 0, {}, 4, 2).run()
    assert kernel.started == []
    assert not launch.counts
