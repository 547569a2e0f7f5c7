"""Does the example for users of plain torch do what it prints?"""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_torch.py"


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    found = runpy.run_path(str(EXAMPLE))
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["gate 0 changes nothing: True", "but has a gradient: True"]
    assert tuple(found["out"].shape) == (2, 37, 8, 64)


def test_example_is_twelve_lines() -> None:
    body = EXAMPLE.read_text(encoding="utf-8").split('"""')[2]
    assert len([line for line in body.splitlines() if line.strip()]) <= 12
