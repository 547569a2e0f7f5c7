"""For every test: one torch thread, own caches, poisoned memory, a skip without a GPU."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)
# torch lists its constructors at the first use of a device context, and must find the real ones:
# a poisoned torch.empty in that list would make the meta device allocate memory ever after
with torch.device("meta"):
    torch.empty(0)

ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (Tensor, "new_empty"),
    (Tensor, "new_empty_strided"),
)


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An allocator whose memory is NaN, or the largest integer: reading it before writing shows."""

    def wrapper(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            # one that wants a gradient may not be written where gradients are recorded
            with torch.no_grad():
                return tensor.fill_(float("nan"))
        return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

    return wrapper


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test, and no process that one starts, reads or fills the caches of whoever runs them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LLAMA_ADAPTER_CACHE", str(tmp_path_factory.mktemp("caches")))
        yield


@pytest.fixture(autouse=True)
def poison_fresh_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of operations get no lucky zeros from torch.empty and its like."""
    if "adapter_kernels" in request.path.parts:
        for owner, name in ALLOCATORS:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and say so."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
