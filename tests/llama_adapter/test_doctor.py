"""The doctor reports what is there and names what is wrong with its remedy."""

import importlib.metadata
import types

import pytest
import torch

from llama_adapter import doctor


def test_healthy_environment(capsys: pytest.CaptureFixture[str]) -> None:
    facts, problems = doctor.report()
    named = dict(facts)
    assert problems == []
    assert named["torch"] == importlib.metadata.version("torch")
    assert named["cpu"].endswith("backends: hybrid for attention, reference for the rest")
    assert doctor.main() == 0
    assert "everything needed is here" in capsys.readouterr().out


def test_old_and_missing_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.metadata.version

    def version(package: str) -> str:
        if package == "sentencepiece":
            raise importlib.metadata.PackageNotFoundError(package)
        return "2.1.0" if package == "torch" else real(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    _, problems = doctor.report()
    assert "torch 2.1.0 does not fit >=2.11: pip install 'torch>=2.11'" in problems
    assert "sentencepiece is missing: pip install 'sentencepiece>=0.2'" in problems
    assert doctor.main() == 1
    assert "2 problem(s) found" in capsys.readouterr().out


def test_broken_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    real_find, real_import = importlib.util.find_spec, importlib.import_module

    def find(name: str) -> object:
        return types.SimpleNamespace(origin=None) if name == "torchvision" else real_find(name)

    def load(name: str) -> object:
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist\nmore")
        return real_import(name)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(importlib, "import_module", load)
    (problem,) = doctor.report()[1]
    assert f"torchvision does not fit torch {torch.__version__}" in problem
    assert "(operator torchvision::nms does not exist)" in problem
    assert "pip uninstall torchvision" in problem


def test_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda, "get_device_name", lambda index: "Tesla V100")
    monkeypatch.setattr(cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(cuda, "mem_get_info", lambda index: (8 * 2**30, 16 * 2**30))
    facts, problems = doctor.report()
    assert dict(facts)["cuda:0"].startswith("Tesla V100, sm_70, 8 of 16 GiB free")
    assert dict(facts)["cuda:0"].endswith("backends: reference")
    assert problems == ["cuda:0 is sm_70: bfloat16 needs sm_80 or newer"]
