"""Does every GPU find its rows, a strange one those of the nearest lower one, and says so once?"""

import warnings

import pytest
import torch

from adapter_kernels import arch
from adapter_kernels.zero_init_attention import configs, dispatch


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(80, 80), (87, 86), (89, 89), (90, 90), (91, 90), (103, 100), (121, 120), (200, 120)],
)
def test_nearest_is_the_highest_that_is_not_above(capability: int, expected: int) -> None:
    assert arch.nearest(capability) == expected


def test_an_unknown_gpu_takes_the_nearest_rows_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arch._capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 9))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    try:
        with pytest.warns(UserWarning, match=r"compute capability 9\.9 .*those of sm_90"):
            assert arch.capability_of(torch.device("cuda")) == 90
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert arch.capability_of(torch.device("cuda", 0)) == 90
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
            assert arch.capability_of(torch.device("cuda", 1)) == 86
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
            assert arch.capability_of(torch.device("cuda", 2)) is None
    finally:
        arch._capability.cache_clear()


def test_other_devices_have_the_rows_that_the_interpreter_runs() -> None:
    assert arch.capability_of(torch.device("cpu")) == 80


def test_every_architecture_has_tiles_and_rules() -> None:
    assert set(configs.CAPABILITIES) == set(dispatch.RULES) == set(arch.ARCHS)
    assert [arch.ARCHS[90].name, arch.ARCHS[90].shared_memory] == ["sm_90", 232448]
