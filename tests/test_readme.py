"""The README's commands and snippets run as printed, and its numbers have their files.

`make test` is left out, being what runs this.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama_adapter.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    return [line for line in lines if line != "make test"]


def test_the_commands_are_the_promised_ones() -> None:
    found = commands()
    assert found[0] == "make quickstart"
    assert "make test" in "\n".join(blocks("bash"))
    assert len([line for line in found if line.startswith("llama-adapter ")]) >= 3


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_snippet(
    index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = blocks("python")[index]
    if "runs/quickstart" in code:
        # the page speaks of what `make quickstart` leaves behind; here after a step of training
        monkeypatch.chdir(tmp_path)
        assert main(["quickstart", "--steps", "1", "--items", "1"]) == 0
        capsys.readouterr()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    for target in targets:
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_tree_is_the_tree() -> None:
    (tree,) = [block for block in blocks("text") if "kernels/adapter_kernels/" in block]
    for name in re.findall(r"\b[a-z_0-9]+\.py\b", tree):
        assert list(ROOT.glob(f"kernels/**/{name}")) + list(ROOT.glob(f"llama_adapter/**/{name}"))


@pytest.mark.slow
def test_commands_run_as_printed(tmp_path: Path) -> None:
    """In a copy of the sources that shares this environment: the installation is not repeated."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    # the environment of whoever runs this test stands in for the one that make would create
    binaries = Path(sys.executable).parent
    (tmp_path / ".venv").symlink_to(binaries.parent)
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    for key in ("OMP_NUM_THREADS", "MAKEFLAGS", "MAKELEVEL"):
        environment.pop(key, None)
    shown = []
    for command in commands():
        words = command.split() if command.startswith("make") else ["bash", "-c", command]
        if command.startswith("make"):
            # newer than its sources, as after an installation
            words += ["--assume-old=.venv/.installed"]
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        shown.append(done.stdout)
    (before,) = re.findall(r"^base +([\d.]+)% of", shown[0], flags=re.MULTILINE)
    (after,) = re.findall(r"^adapter +([\d.]+)% of", shown[0], flags=re.MULTILINE)
    assert float(before) <= 25
    assert float(after) >= 90
    (seconds,) = re.findall(r"^total time +(\d+) s", shown[0], flags=re.MULTILINE)
    assert int(seconds) <= 180
    # the page shows the same lines, with that machine's numbers
    printed = next(block for block in blocks("text") if "held-out instructions" in block)
    for label in ("base model", "recipe", "loss curve", "total time"):
        assert label in printed
        assert label in shown[0]
