"""The doctor reports what is there and names what is wrong with its remedy."""

import importlib.metadata
import sysconfig
import types
from pathlib import Path

import pytest
import torch

from llama_adapter import doctor


def test_healthy_environment(capsys: pytest.CaptureFixture[str]) -> None:
    facts, problems = doctor.report()
    named = dict(facts)
    assert problems == []
    assert named["torch"] == importlib.metadata.version("torch")
    assert named["cpu"].endswith("in float32, hybrid for attention, reference for the rest")
    assert Path(named["C++ compiler"]).is_file()
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


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str = "H100"
) -> None:
    """One GPU, and a triton for it."""
    cuda, real = torch.cuda, importlib.metadata.version
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "device_count", lambda: 1)
    monkeypatch.setattr(cuda, "get_device_name", lambda index: name)
    monkeypatch.setattr(cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(cuda, "mem_get_info", lambda index: (8 * 2**30, 16 * 2**30))
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "3.7.1" if name == "triton" else real(name)
    )


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the PATH, no CC, and the headers of Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "Python.h").touch()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(folder))
    return folder


def place(path: Path) -> str:
    path.touch(mode=0o755)
    return str(path)


def test_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch, programs: Path) -> None:
    pretend_gpu(monkeypatch, (7, 0), "Tesla V100")
    facts, problems = doctor.report()
    assert dict(facts)["cuda:0"].startswith("Tesla V100, sm_70, 8 of 16 GiB free")
    assert dict(facts)["cuda:0"].endswith("backends: reference")
    assert problems == ["cuda:0 is sm_70: bfloat16 needs sm_80 or newer"]
    # the references need no compiler
    assert dict(facts)["C compiler"] == "none (needed with a GPU)"


def test_operations_with_kernels_are_named(monkeypatch: pytest.MonkeyPatch, programs: Path) -> None:
    pretend_gpu(monkeypatch, (9, 0))
    place(programs / "gcc")
    facts, problems = doctor.report()
    assert problems == []
    assert dict(facts)["cuda:0"].startswith("H100, sm_90, 8 of 16 GiB free, backends: triton")
    assert dict(facts)["cuda:0"].endswith("swiglu and linear_cross_entropy")


def test_a_compiler_is_found_where_triton_finds_it(
    monkeypatch: pytest.MonkeyPatch, programs: Path
) -> None:
    # triton does not look for this name
    place(programs / "cc")
    facts, problems = doctor.report()
    assert (dict(facts)["C compiler"], problems) == ("none (needed with a GPU)", [])
    found = {name: place(programs / name) for name in ("clang", "gcc", "own")}
    assert dict(doctor.report()[0])["C compiler"] == found["gcc"]
    (programs / "gcc").unlink()
    assert dict(doctor.report()[0])["C compiler"] == found["clang"]
    for named in ("own", found["own"]):
        monkeypatch.setenv("CC", named)
        assert dict(doctor.report()[0])["C compiler"] == found["own"]


def test_without_a_compiler_a_gpu_is_of_no_use(
    monkeypatch: pytest.MonkeyPatch, programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_gpu(monkeypatch, (9, 0))
    facts, problems = doctor.report()
    assert dict(facts)["C compiler"] == "none"
    assert problems == ["triton needs a C compiler: apt install gcc, or set CC"]
    assert doctor.main() == 1
    assert "problem: triton needs a C compiler" in capsys.readouterr().out


@pytest.mark.parametrize("named", ["absent", "ccache gcc", ""])
def test_cc_names_one_program(named: str, monkeypatch: pytest.MonkeyPatch, programs: Path) -> None:
    """Triton starts CC as it is, whatever else there is on the PATH."""
    for program in ("gcc", "ccache"):
        place(programs / program)
    monkeypatch.setenv("CC", named)
    pretend_gpu(monkeypatch, (8, 0))
    facts, problems = doctor.report()
    assert dict(facts)["C compiler"] == f"none: CC={named} is no program on the PATH"
    (problem,) = problems
    assert problem.endswith(f"and CC={named} is no program: unset or correct CC")


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, programs: Path) -> None:
    header = programs / "Python.h"
    header.unlink()
    place(programs / "gcc")
    assert doctor.report()[1] == []
    pretend_gpu(monkeypatch, (9, 0))
    assert doctor.report()[1] == [f"triton needs {header}: apt install python3-dev"]


def test_an_optional_package_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    found: dict[str, str | None] = {"torchao": "0.18.0"}

    def version(package: str) -> str:
        if package not in found:
            return real(package)
        if found[package] is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return str(found[package])

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert dict(doctor.report()[0])["torchao"] == "0.18.0"
    found["torchao"] = "0.16.0"
    assert doctor.report()[1] == ["torchao 0.16.0 does not fit >=0.17: pip install 'torchao>=0.17'"]
    found["torchao"] = None
    facts, problems = doctor.report()
    assert (dict(facts)["torchao"], problems) == ("not installed (optional)", [])
