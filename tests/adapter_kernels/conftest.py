"""Tests of operations say themselves whether native.cpp answers: by default it does not."""

import pytest

from adapter_kernels import native

OPERATIONS = ("decode", "linear", "rms_norm", "swiglu", "write_cache")


@pytest.fixture(autouse=True)
def general_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other tests of this process loaded is out of the way."""
    for name in OPERATIONS:
        monkeypatch.setattr(native, name, native.takes_nothing)


@pytest.fixture
def native_way(general_way: None) -> None:
    """The compiled operations; a test that asks for them needs a C++ compiler, as CI has one."""
    assert native.load()
