"""The command's entry: the same command line, and no traceback for Ctrl-C while torch loads."""

import builtins
import subprocess
import sys

import pytest

from llama_adapter.__main__ import main


def test_module_runs_the_command_line() -> None:
    command = [sys.executable, "-m", "llama_adapter", "finetune", "--epoch", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean --epochs?" in done.stderr


def test_interrupt_during_the_imports_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def interrupted(name: str, *rest: object, **named: object) -> object:
        if name == "llama_adapter.cli":
            raise KeyboardInterrupt
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    assert main() == 130
    assert capsys.readouterr() == ("", "")
