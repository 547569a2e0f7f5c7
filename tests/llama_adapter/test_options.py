"""Options come from dataclasses: names, types, defaults, help, and errors of one line."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llama_adapter.options import Parser, UsageError, add_options, build, read_config


@dataclass(frozen=True)
class Inner:
    """Inner options."""

    depth: int | None = field(default=None, metadata={"help": "how deep"})
    kind: str = field(default="b", metadata={"help": "which", "choices": ("a", "b")})


@dataclass(frozen=True)
class Outer:
    """Outer options."""

    data: Path = field(metadata={"help": "the file"})
    base_lr: float = field(default=0.5, metadata={"help": "100% of the rate"})
    betas: tuple[float, float] = field(default=(0.9, 0.95), metadata={"help": "decays"})
    stop: tuple[str, ...] = field(default=(), metadata={"help": "strings"})
    strict: bool = field(default=False, metadata={"help": "be strict"})
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.base_lr <= 0:
            raise ValueError(f"base_lr must be positive, got {self.base_lr}")


def parse(*words: str) -> Outer:
    parser = Parser(prog="prog", allow_abbrev=False)
    add_options(parser, Outer)
    return build(Outer, vars(parser.parse(list(words))))


def test_every_field_becomes_an_option() -> None:
    words = "--data x.json --base-lr 2 --betas 0.1 0.2 --stop a b --strict --depth 3 --kind a"
    assert parse(*words.split()) == Outer(
        Path("x.json"), 2.0, (0.1, 0.2), ("a", "b"), True, Inner(3, "a")
    )


def test_absent_options_take_the_defaults() -> None:
    assert parse("--data", "x.json") == Outer(Path("x.json"))
    assert parse("--data", "x.json", "--no-strict").strict is False


def test_help_shows_text_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    assert "100% of the rate (default: 0.5)" in shown
    assert "decays (default: 0.9 0.95)" in shown
    assert "Inner options" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--base-lr much", "argument --base-lr: invalid float value: 'much'"),
        ("--data x --kind c", "argument --kind: invalid choice: 'c'"),
        ("--data x --betas 0.1", "argument --betas: expected 2 arguments"),
        ("--data x --base-ler 3", "unknown argument --base-ler, did you mean --base-lr?"),
        ("--data x surplus", "unknown argument surplus"),
    ],
)
def test_bad_options_end_in_one_line(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parse(*words.split())
    shown = capsys.readouterr().err
    assert left.value.code == 2
    assert shown.count("\n") == 1
    assert message in shown


def test_missing_and_refused_values() -> None:
    with pytest.raises(UsageError, match=r"^--data is required$"):
        parse()
    with pytest.raises(UsageError, match=r"^base_lr must be positive, got -1.0$"):
        parse("--data", "x", "--base-lr=-1")


def test_config_file_gives_the_same_fields(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    content = {"data": "x.json", "base_lr": 2, "betas": [0.1, 0.2], "inner": {"depth": None}}
    path.write_text(json.dumps(content))
    config = build(Outer, read_config(path, Outer))
    assert config == Outer(Path("x.json"), 2.0, (0.1, 0.2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "expected a JSON object, got list"),
        ("{", "Expecting property name"),
        ('{"base_ler": 1}', "unknown name base_ler, did you mean base_lr"),
        ('{"base_lr": "fast"}', "base_lr must be float, got 'fast'"),
        ('{"depth": true}', "depth must be int, got True"),
        ('{"betas": [0.9]}', r"betas must hold 2 values, got \[0.9\]"),
        ('{"betas": ["a", "b"]}', "betas must be float, got 'a'"),
        ('{"strict": 1}', "strict must be bool, got 1"),
    ],
)
def test_bad_config_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        read_config(path, Outer)
    with pytest.raises(UsageError, match="No such file"):
        read_config(tmp_path / "absent.json", Outer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1: 2", "c.yaml: unknown name 1"),
        ("on: 2", "c.yaml: unknown name True"),
        ("~: 2", "c.yaml: unknown name None"),
        ("inner: {1: 2}", "c.yaml: unknown name 1"),
        ("base_lr: 1\nbase_lr: 2", "c.yaml: base_lr is there twice"),
        ("inner: {depth: 1, depth: 2}", "c.yaml: depth is there twice"),
        ("? [1, 2]\n: 3", r"c.yaml: no YAML \("),
    ],
)
def test_bad_yaml_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_config(path, Outer)


def test_yaml_has_powers_of_ten_and_merges(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("inner: &a {depth: 3}\nbase_lr: 2e-3\nbetas: [5E-1, .25e+0]\n")
    assert read_config(path, Outer) == {"depth": 3, "base_lr": 0.002, "betas": (0.5, 0.25)}
    path.write_text("<<: {base_lr: 1e-2, depth: 1}\ndepth: 2\n")
    assert read_config(path, Outer) == {"base_lr": 0.01, "depth": 2}
