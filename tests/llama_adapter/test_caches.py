"""Caches lie where they are told to, else among the user's."""

import os
from pathlib import Path

import pytest

from llama_adapter.caches import ENVIRONMENT, cache_folder


def test_a_cache_lies_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    assert cache_folder("features", "--feature-cache") == tmp_path / "features"
    monkeypatch.delenv(ENVIRONMENT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    wanted = tmp_path / "xdg" / "llama-adapter" / "features"
    assert cache_folder("features", "--feature-cache") == wanted


def test_without_a_home_the_option_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ENVIRONMENT, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nowhere(path: str) -> str:
        return path

    monkeypatch.setattr(os.path, "expanduser", nowhere)
    with pytest.raises(OSError, match=r"features cannot be cached .* folder with --feature-cache"):
        cache_folder("features", "--feature-cache")
