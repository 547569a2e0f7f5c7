"""Does a launch start its kernel with its arguments, count it, and do nothing for an empty grid?"""

from typing import Any

import pytest

from adapter_kernels import launch


class Kernel:
    """Stands in for a jitted function."""

    __name__ = "kernel"

    def __init__(self) -> None:
        self.started: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.started.append((grid, arguments))


@pytest.fixture(autouse=True)
def no_launch_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "counts", type(launch.counts)())


def test_a_launch_runs_and_is_counted() -> None:
    kernel = Kernel()
    for _ in range(2):
        launch.Launch(kernel, 7, {"x": 3, "y": None}, 4, 2).run()
    expected = {"x": 3, "y": None, "num_warps": 4, "num_stages": 2}
    assert kernel.started == [((7,), expected)] * 2
    assert launch.counts == {"kernel": 2}


def test_an_empty_grid_starts_nothing() -> None:
    kernel = Kernel()
    launch.Launch(kernel, 0, {}, 4, 2).run()
    assert kernel.started == []
    assert not launch.counts
