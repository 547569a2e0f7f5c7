"""`finetune --host` on the command line: recipes, configs, resuming, and errors in one line."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.cli import main
from llama_adapter.host_training.command import RECIPES, is_wanted, recipe_names
from llama_adapter.host_training.host_config import HostRunConfig
from llama_adapter.options import build, read_config
from llama_adapter.run_folder import RunFolder
from tests.llama_adapter.host_runs import options_of, words_of

# of P-tuning v2's scripts: prompt length, learning rate, batch, epochs, dropout, length, seed
P_TUNING_V2 = {
    "squad1": (16, 5e-3, 8, 30, 0.2, 384, 11),
    "squad2": (8, 5e-3, 8, 10, 0.2, 384, 11),
    "conll03": (11, 3e-2, 16, 30, 0.1, 152, 11),
    "conll04": (144, 6e-2, 32, 80, 0.1, 128, 11),
    "ontonotes_ner": (48, 7e-3, 16, 60, 0.1, 128, 14),
    "conll05": (224, 6e-3, 16, 15, 0.1, 128, 11),
    "conll12": (64, 5e-3, 32, 45, 0.1, 128, 11),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss curve takes longer to draw than these runs take."""
    monkeypatch.setattr(RunFolder, "draw_curve", lambda self: None)


def run(*words: object) -> int:
    return main([str(word) for word in words])


def words(task: str, made: Path, *without: str) -> list[str]:
    options = {k: v for k, v in options_of(task, made).items() if k not in without}
    return ["finetune", *words_of(options), "--quiet"]


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_a_run_tells_its_choice_and_where_it_is(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    grid = ("--lr-grid", 0.01, 0.05, "--final", "train+val")
    assert run(*words("vtab", made), "--output", out, *grid) == 0
    shown = capsys.readouterr().out
    assert re.search(
        r"^trained     225 parameters of zero_init on 22 items, 30 steps$", shown, re.M
    )
    assert re.search(r"^lr          0.01: accuracy [\d.]+", shown, re.M)
    assert shown.count(", chosen") == 1
    assert f"adapter     {out / 'adapter.safetensors'}" in shown
    assert f"loss curve  {out / 'loss.png'}" in shown
    assert (out / "checkpoints").is_dir()
    assert list(out.glob("events.out.tfevents.*"))


def test_what_is_told_is_of_the_weights_that_remain(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    keep = ("--keep", "last", "--lr", 0.3, "--epochs", 5)
    assert run(*words("vtab", made, "lr", "epochs"), "--output", out, *keep) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scores = [row["val_accuracy"] for row in rows if "val_accuracy" in row]
    said = f"validation  accuracy {scores[-1]:.2f} in the last epoch"
    assert said in capsys.readouterr().out
    # nothing is chosen where nothing is trained
    frozen = ("--method", "frozen", "--lr-grid", 0.1, 0.2)
    plain = words("base_to_novel", made, "prompt_length")
    assert run(*plain, "--output", tmp_path / "frozen", *frozen) == 0
    shown = capsys.readouterr().out
    assert "trained     0 parameters of frozen" in shown
    assert "chosen" not in shown


def test_the_loss_curve_is_drawn(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert run(*words("conll03", made), "--output", tmp_path / "run", "--epochs", 1) == 0
    assert (tmp_path / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_config_repeats_a_run_and_a_folder_resumes_itself(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    plain = words("conll05", made, "prompt_length")
    assert run(*plain, "--output", first, "--method", "adapter") == 0
    assert run("finetune", "--config", first / "config.json", "--output", second, "--quiet") == 0
    one, two = (folder / "method.safetensors" for folder in (first, second))
    assert one.read_bytes() == two.read_bytes()
    assert run("finetune", "--output", second, "--resume", "--quiet") == 0
    assert one.read_bytes() == two.read_bytes()
    capsys.readouterr()
    assert run("finetune", "--output", second, "--resume", "--lr", 0.5, "--quiet") == 2
    assert "fit.lr was 0.02, is now 0.5" in capsys.readouterr().err
    assert run("finetune", "--host", "vit", "--output", tmp_path / "none", "--resume") == 2
    assert "none holds no run (config.json is missing)" in capsys.readouterr().err


def test_a_recipe_is_overruled_by_a_config_and_that_by_the_command_line(
    made: Path, tmp_path: Path
) -> None:
    config = tmp_path / "own.json"
    config.write_text(json.dumps({"epochs": 1, "batch_size": 7, "prompt_length": 5}))
    chosen = ("--recipe", "conll03", "--config", config, "--prompt-length", 4, "--max-length", 40)
    without = ("host", "task", "epochs", "batch_size", "lr", "prompt_length", "max_length")
    out = tmp_path / "run"
    assert run(*words("conll03", made, *without), "--output", out, *chosen) == 0
    found = config_in(out)
    assert (found["fit"]["lr"], found["fit"]["schedule"], found["fit"]["seed"]) == (
        0.03,
        "linear",
        11,
    )
    assert (found["fit"]["epochs"], found["fit"]["batch_size"]) == (1, 7)
    assert found["method_options"]["prompt_length"] == 4
    assert found["method_options"]["prompt_kind"] == "kv"
    assert found["task_options"]["max_length"] == 40
    assert found["hidden_dropout"] == 0.1


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_are_the_published_ones(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    given = read_config(path, HostRunConfig, "--recipe")
    given |= {"model": Path("m"), "data": Path("d"), "output": Path("o")}
    more: dict[str, Any] = {"test_data": (Path("t"),)} if name in P_TUNING_V2 else {}
    more |= {"dataset": "EuroSAT"} if name == "base_to_novel" else {}
    config = build(HostRunConfig, given | more)
    fit, options, task = config.fit, config.method_options, config.task_options
    if name in P_TUNING_V2:
        assert P_TUNING_V2[name] == (
            options.prompt_length, fit.lr, fit.batch_size, fit.epochs, config.hidden_dropout,
            task.max_length, fit.seed,
        )  # fmt: skip
        assert (options.prompt_kind, fit.schedule, fit.weight_decay) == ("kv", "linear", 0.0)
    elif name == "base_to_novel":
        assert (fit.optimizer, fit.lr, fit.epochs, fit.batch_size) == ("sgd", 2.5e-3, 5, 4)
        assert (fit.warmup_epochs, fit.warmup_lr, fit.schedule) == (1.0, 1e-5, "cosine")
        assert (options.prompt_length, options.layers, task.shots) == (8, None, 16)
    else:
        assert (fit.epochs, fit.warmup_epochs, fit.batch_size) == (100, 10.0, 64)
        assert (config.final, fit.schedule) == ("train+val", "cosine")
    if name == "vtab":
        grid = [50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05]
        assert config.lr_grid == pytest.approx([rate * 64 / 256 for rate in grid])
        assert (fit.optimizer, fit.momentum, fit.seed) == ("sgd", 0.9, 42)
    # where a number comes from, and which are chosen here, is said at its top
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--recipe", "vtba"), "--recipe must be one of base_to_novel, conll03, "),
        (
            ("--recipe", "vtab", "--epochs", 2),
            "warmup_epochs must be from 0 to epochs = 2, got 10.0 (with what --recipe vtab says)",
        ),
        (("--recipe", "none.yaml"), "--recipe none.yaml: No such file"),
        (("--method", "lora", "--prompt-length", 4), "--prompt-length is no option of the method"),
        (("--method", "coop"), "method coop is for clip, got the host vit"),
        (("--host", "bert"), "host must be vit or clip for vtab, got bert"),
        (("--model", "nowhere"), "nowhere must be a folder with a config.json in it"),
        (("--data", "nowhere"), "nowhere"),
        (("--encoders", "text"), "encoders must be of visual for zero_init, got 'text'"),
        (("--layers", 3), "3"),
        (("--lr-grid", 0.1, -1), "lr_grid must hold positive learning rates, got -1.0"),
        (("--optimizer", "sgd", "--lr", 1e30, "--method", "full"), "learning rate"),
    ],
)
def test_a_bad_request_is_one_line_and_2(
    more: tuple[object, ...],
    said: str,
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = words("vtab", made, "prompt_length")
    assert run(*plain, "--output", tmp_path / "run", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("llama-adapter finetune: error: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_recipe_with_an_unknown_key_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.yaml"
    plain = (*words("vtab", made), "--output", tmp_path / "run", "--recipe", own)
    for text, said in (
        ("epoch: 3", "unknown name epoch, did you mean epochs?"),
        ("epochs: many", "epochs must be int, got 'many'"),
        ("- epochs", "expected a YAML mapping, got list"),
        ("epochs: [", "no YAML ("),
    ):
        own.write_text(text)
        assert run(*plain) == 2
        error = capsys.readouterr().err
        assert (
            f"--recipe {own}: {said}".replace(f"--recipe {own}: epochs must", "epochs must")
            in error
        )
        assert error.count("\n") == 1


def test_an_unknown_word_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run("finetune", "--host", "vit", "--promt-length", 3)
    assert left.value.code == 2
    assert "did you mean --prompt-length?" in capsys.readouterr().err


def test_help_is_of_the_kind_of_model(capsys: pytest.CaptureFixture[str]) -> None:
    for more, has, lacks in (
        (("--host", "vit"), "--lr-grid", "--val-fraction"),
        ((), "--val-fraction", "--lr-grid"),
    ):
        with pytest.raises(SystemExit):
            run("finetune", *more, "--help")
        shown = capsys.readouterr().out
        assert "--host" in shown
        assert has in shown
        assert lacks not in shown


def test_what_is_about_a_host(tmp_path: Path) -> None:
    assert is_wanted(["--host", "vit"])
    assert is_wanted(["--host=vit"])
    assert is_wanted(["--recipe", "vtab", "--output", "x"])
    assert not is_wanted(["--data", "x.json", "--output", str(tmp_path)])
    held = tmp_path / "config.json"
    held.write_text('{"host": "vit"}')
    assert is_wanted(["--output", str(tmp_path), "--resume"])
    assert is_wanted(["--config", str(held)])
    # without --resume it is a folder in use, whatever it holds
    assert not is_wanted(["--output", str(tmp_path), "--data", "x.json"])
    held.write_text('{"data": "x.json"}')
    assert not is_wanted(["--output", str(tmp_path), "--resume"])
    assert is_wanted(["--host", "vit", "--resume=yes"])
    assert not is_wanted(["--resume=yes"])
    held.write_text("{")
    assert not is_wanted(["--output", str(tmp_path), "--resume"])


def test_without_transformers_the_remedy_is_named(made: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['transformers'] = None\nfrom llama_adapter.cli import main\n"
    given = [*words("vtab", made), "--output", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(main({given!r}))"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "hosts need transformers: pip install 'llama-adapter-kernels[hf]'" in done.stderr
    assert done.stderr.count("\n") == 1
