"""Who attends where? The table's rules, and what each backend cannot do."""

import pytest
import torch
from torch import Tensor

from adapter_kernels import backend, zero_init_attention
from adapter_kernels.backend import INTERPRETED
from adapter_kernels.zero_init_attention import dispatch
from adapter_kernels.zero_init_attention.library import launchers

DENSE = {"causal": True, "packed": False, "padded": False, "training": False}


class Gpu:
    """Stands in for queries on a GPU: what dispatch asks of them."""

    def __init__(self, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.dtype = (2, 2048, 8, head_dim), dtype
        self.device = torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    for module in (dispatch, backend):
        monkeypatch.setattr(module, "capability_of", lambda device: request.param)
    return request.param


def backends(q: object, keys: int = 2048, scale: float = 0.1, **kind: bool) -> tuple[str, ...]:
    return dispatch.backends_for(q, keys, scale, **DENSE | kind)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("capability", "first"),
    [(80, "triton"), (86, "triton"), (90, "hybrid"), (120, "triton")],
    indirect=["capability"],
)
def test_the_first_of_a_gpu_is_its_rule(capability: int, first: str) -> None:
    assert backends(Gpu())[0] == first
    assert set(backends(Gpu())) == {"triton", "hybrid", "reference"}


@pytest.mark.parametrize("capability", [90], indirect=True)
def test_the_rule_depends_on_length_and_width(capability: int) -> None:
    assert backends(Gpu(), keys=1023)[0] == "triton"
    assert backends(Gpu(head_dim=256))[0] == "triton"
    assert backends(Gpu(head_dim=64))[0] == "hybrid"


@pytest.mark.parametrize("capability", [90], indirect=True)
@pytest.mark.parametrize(
    "change",
    [
        {"keys": 2049},
        {"packed": True},
        {"padded": True},
        {"scale": -1.0},
        {"scale": 0.0},
        {"q": Gpu(dtype=torch.float32)},
    ],
    ids=["not square", "packed", "padded", "negative scale", "scale 0", "float32"],
)
def test_what_no_library_does_goes_to_the_kernels(capability: int, change: dict) -> None:
    arguments = {"q": Gpu()} | change
    assert backends(**arguments) == ("triton", "reference")
    assert "hybrid" in backends(Gpu(), 2049, causal=False)


@pytest.mark.parametrize("capability", [90], indirect=True)
def test_without_triton_a_library_is_better_than_the_reference(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (dispatch, backend):
        monkeypatch.setattr(module, "HAS_TRITON", False)
    assert backends(Gpu()) == ("hybrid", "reference")
    assert backends(Gpu(), packed=True) == ("reference",)


@pytest.mark.parametrize("capability", [None], indirect=True)
def test_a_gpu_older_than_all_rows_gets_the_reference(capability: None) -> None:
    assert backends(Gpu()) == ("reference",)


@pytest.mark.parametrize("capability", [90, 80], indirect=True)
def test_libraries(capability: int) -> None:
    def name(q: object) -> str:
        library = dispatch.library_of(q)  # pyright: ignore[reportArgumentType]
        return next(n for n, found in dispatch.LIBRARIES.items() if found is library)

    assert name(Gpu()) == ("cudnn" if capability == 90 else "flash")
    assert name(Gpu(head_dim=192)) == "flash"
    assert name(torch.empty(1)) == "cpu"


def test_every_rule_says_its_measurement_or_that_there_is_none() -> None:
    for rules in dispatch.RULES.values():
        assert rules[-1].keys == 0
        assert rules[-1].head_dim == 256
        for rule in rules:
            assert rule.reason.startswith("unmeasured: ") or any(c.isdigit() for c in rule.reason)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_default_here(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU has torch's flash kernel; the interpreter's nonsense in bfloat16 is never chosen."""
    expected = "triton" if INTERPRETED and dtype != torch.bfloat16 else "hybrid"
    module, called = launchers(expected), []
    original = module.attention

    def recording(*args: object) -> tuple[Tensor, ...]:
        called.append(expected)
        return original(*args)

    monkeypatch.setattr(module, "attention", recording)
    q = torch.randn(1, 5, 2, 8).to(dtype)
    zero_init_attention(q, q, q)
    if not (INTERPRETED and dtype == torch.bfloat16):
        assert called == [expected]
