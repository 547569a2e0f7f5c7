"""`evaluate TASK --run RUN`: scores of the run's own model, resumable, errors in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llama_adapter.cli import main
from llama_adapter.evaluation import host_command
from llama_adapter.host_training.fit import evaluate
from llama_adapter.host_training.host_config import HostRunConfig
from llama_adapter.host_training.run import HostResult, train_host
from llama_adapter.options import build
from llama_adapter.run_folder import RunFolder
from tests.llama_adapter.host_runs import options_of, write_conll03, write_squad

METHODS = {
    "vtab": "zero_init",
    "squad": "p_tuning_v2",
    "conll03": "zero_init",
    "conll05": "lora",
    "base_to_novel": "zero_init",
}


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made")


@pytest.fixture(scope="module")
def runs(made: Path) -> dict[str, HostResult]:
    """A run of every task, once."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunFolder, "draw_curve", lambda self: None)
        return {
            task: train_host(
                build(
                    HostRunConfig,
                    {**options_of(task, made), "output": made / f"run-{task}", "method": method},
                ),
                progress=False,
            )
            for task, method in METHODS.items()
        }


def scores_in(folder: Path) -> dict[str, float]:
    return json.loads((folder / "scores.json").read_text())["scores"]


def predictions_in(folder: Path) -> list[Any]:
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line)["prediction"] for line in lines]


@pytest.mark.parametrize("task", list(METHODS))
@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_run_from_its_files_says_what_the_trained_model_said(
    task: str,
    split: str,
    runs: dict[str, HostResult],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result, out = runs[task], tmp_path / "evaluation"
    given = ("--run", result.folder.path, "--split", split, "--output", out, "--quiet")
    assert run("evaluate", task, *given, "--batch-size", 4) == 0
    predictions, scores = evaluate(result.attached.model, result.task, split)
    assert predictions_in(out) == json.loads(json.dumps(predictions))
    assert scores_in(out) == pytest.approx(scores)
    shown = capsys.readouterr().out
    assert f"{task} {split}, {len(predictions)} items, {METHODS[task]} in " in shown
    files = {
        "squad": "predictions.json",
        "conll03": "conlleval.txt",
        "conll05": "conlleval.txt",
    }
    written = out / files.get(task, "accuracies.json")
    assert f"result      {written}" in shown
    if task == "squad":
        texts = {
            item.id: one["text"] for item, one in zip(result.task.test, predictions, strict=True)
        }
        assert json.loads(written.read_text()) == texts
    elif task.startswith("conll"):
        found = [line.split()[-1] for line in written.read_text().splitlines() if line]
        assert found == [tag for tags in predictions for tag in tags]
    else:
        assert json.loads(written.read_text()) == pytest.approx(scores)


def test_an_evaluation_goes_on_where_it_was_stopped(
    runs: dict[str, HostResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, path = tmp_path / "evaluation", runs["conll03"].folder.path
    words = ("evaluate", "conll03", "--run", path, "--output", out, "--quiet", "--batch-size", 2)
    task = type(runs["conll03"].task)
    real, asked = task.predict, []

    def predict(self: Any, model: Any, items: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(items))
        return real(self, model, items)

    monkeypatch.setattr(task, "predict", predict)
    assert run(*words) == 130
    assert len(predictions_in(out)) == 4
    monkeypatch.setattr(
        task,
        "predict",
        lambda self, model, items: asked.append(len(items)) or real(self, model, items),
    )
    assert run(*words) == 0
    assert asked == [2, 2, 2, 1]
    expected = evaluate(runs["conll03"].attached.model, runs["conll03"].task, "test")
    assert predictions_in(out) == expected[0]


def test_another_run_does_not_mix_with_what_is_there(
    runs: dict[str, HostResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, copy, out = runs["vtab"].folder.path, tmp_path / "copy", tmp_path / "evaluation"
    assert run("evaluate", "vtab", "--run", path, "--output", out, "--quiet") == 0
    shutil.copytree(path, copy)
    # the same again, from a folder that has moved
    assert run("evaluate", "vtab", "--run", copy, "--output", out, "--quiet") == 0
    from llama_adapter.host_training.method_file import host_fingerprint, save_trained

    attached = runs["vtab"].attached
    before = attached.state_dict()
    attached.load_state_dict({name: value + 1 for name, value in before.items()})
    save_trained(copy, attached, host_fingerprint(attached.model))
    attached.load_state_dict(before)
    assert load_file(copy / "adapter.safetensors").keys()
    capsys.readouterr()
    assert run("evaluate", "vtab", "--run", copy, "--output", out, "--quiet") == 2
    error = capsys.readouterr().err
    assert "holds another evaluation run: weights is " in error
    assert error.count("\n") == 1


def test_a_host_that_has_moved_is_named(
    runs: dict[str, HostResult],
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, copy = tmp_path / "run", tmp_path / "host"
    shutil.copytree(runs["vtab"].folder.path, path)
    model = options_of("vtab", made)["model"]
    shutil.copytree(model, copy)
    config = path / "config.json"
    config.write_text(config.read_text().replace(str(model), str(tmp_path / "gone")))
    assert run("evaluate", "vtab", "--run", path, "--quiet") == 2
    # runs by their folders' names, wherever they are named from
    monkeypatch.chdir(path)
    capsys.readouterr()
    assert run("evaluate", "vtab", "--run", ".", path, "--model", "../host", "--quiet") == 0
    assert "\n  run       accuracy " in capsys.readouterr().out


@pytest.mark.parametrize("labels", ["[0, 1, 2]", '"abc"', "null", "[" * 100_000])
def test_labels_that_are_none_are_one_line(
    labels: str,
    runs: dict[str, HostResult],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "run"
    shutil.copytree(runs["vtab"].folder.path, path)
    (path / "task.json").write_text(f'{{"labels": {labels}}}')
    capsys.readouterr()
    assert run("evaluate", "vtab", "--run", path, "--quiet") == 2
    error = capsys.readouterr().err
    assert "task.json names no labels (" in error
    assert error.count("\n") == 1


def test_other_images_of_the_same_names_do_not_mix(
    runs: dict[str, HostResult], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other, out = runs["vtab"].folder.path, tmp_path / "other", tmp_path / "evaluation"
    words = ("evaluate", "vtab", "--run", path, "--output", out, "--quiet")
    assert run(*words) == 0
    shutil.copytree(options_of("vtab", made)["data"], other)
    assert run(*words, "--data", other) == 0
    images = other / "images" / "test"
    shutil.copy(images / "0.png", images / "1.png")
    capsys.readouterr()
    assert run(*words, "--data", other) == 2
    assert "items changed: 1, the first is 'images/test/1.png'" in capsys.readouterr().err


def test_both_encoders_of_a_clip_are_what_is_evaluated(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunFolder, "draw_curve", lambda self: None)
    folders = tmp_path / "one", tmp_path / "other"
    for folder, rate in zip(folders, (0.02, 0.05), strict=True):
        given = {"output": folder, "encoders": ("visual", "text"), "epochs": 1, "lr": rate}
        options = {**options_of("base_to_novel", made), **given}
        train_host(build(HostRunConfig, options), progress=False)
    words = ("evaluate", "base_to_novel", "--run", folders[0], "--quiet")
    assert run(*words) == 0
    shutil.copy(folders[1] / "text_adapter.safetensors", folders[0])
    capsys.readouterr()
    assert run(*words) == 2
    assert "holds another evaluation run: weights is " in capsys.readouterr().err
    (folders[0] / "text_adapter.safetensors").unlink()
    assert run(*words) == 2
    said = "text_adapter.safetensors does not exist: the run has not come to its end"
    assert said in capsys.readouterr().err


def test_other_data_is_asked(
    runs: dict[str, HostResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_conll03(tmp_path / "other.txt", 3)
    other.write_text(other.read_text() + "Oslo NNP I-NP B-NEW\n\n")
    path, out = runs["conll03"].folder.path, tmp_path / "evaluation"
    words = ("evaluate", "conll03", "--run", path, "--data", other, "--output", out, "--quiet")
    assert run(*words) == 0
    assert len(predictions_in(out)) == 4
    # a tag that the run has never seen is told of
    assert "tag B-NEW is none of the labels" in (out / "problems.txt").read_text()
    assert "B-NEW" in capsys.readouterr().err
    assert run(*words[:-3], "--output", tmp_path / "strict", "--quiet", "--strict") == 2
    two = write_squad(tmp_path / "two.json", 6, version_2=True)
    squad = runs["squad"].folder.path
    given = ("--data", two, "--output", tmp_path / "two")
    assert run("evaluate", "squad", "--run", squad, *given, "--quiet") == 0
    assert "NoAns_exact" in scores_in(tmp_path / "two")
    odds = json.loads((tmp_path / "two" / "null_odds.json").read_text())
    assert list(odds) == [f"q{n}" for n in range(6)]


def test_several_runs_have_means(
    runs: dict[str, HostResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs on one data set are averaged first: here both are copies of one run."""
    names = []
    for seed in (1, 2):
        folder = tmp_path / f"seed-{seed}"
        shutil.copytree(runs["base_to_novel"].folder.path, folder)
        names.append(folder)
    out = tmp_path / "table"
    given = ("--run", *names, "--output", out, "--quiet")
    assert run("evaluate", "base_to_novel", *given) == 0
    shown = capsys.readouterr().out
    assert "base_to_novel, 2 runs" in shown
    alone = scores_in(names[0] / "evaluate-test")
    content = json.loads((out / "accuracies.json").read_text())
    assert content["means"] == pytest.approx({k: alone[k] for k in content["means"]})
    assert [*content["scores"]] == ["seed-1", "seed-2"]
    assert run("evaluate", "base_to_novel", *given, "--split", "validation") == 0
    assert [*json.loads((out / "accuracies.json").read_text())["means"]] == ["base"]


def test_a_clip_as_it_is_can_be_evaluated(made: Path, tmp_path: Path) -> None:
    """The row of a table that nothing is trained for."""
    options = {**options_of("base_to_novel", made), "method": "frozen", "output": tmp_path / "run"}
    result = train_host(build(HostRunConfig, options), progress=False)
    assert result.folder.rows == []
    again = train_host(build(HostRunConfig, options), resume=True, progress=False)
    assert again.folder.rows == []
    assert run("evaluate", "base_to_novel", "--run", tmp_path / "run", "--quiet") == 0
    expected = evaluate(result.attached.model, result.task, "test")[1]
    assert scores_in(tmp_path / "run" / "evaluate-test") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("squad", "--run", "RUN"), "is of vtab, not of squad"),
        (("vtab", "--run", "nowhere"), "--run nowhere holds no run (config.json is missing)"),
        (("vtab",), "--run is required"),
        (("vtab", "--run", "RUN", "--batch-size", 0), "--batch-size must be at least 1, got 0"),
        (("vtab", "--run", "RUN", "RUN", "--data", "x"), "--data must be left out with 2 runs"),
        (("vtab", "--run", "RUN", "--data", "nowhere"), "nowhere"),
        (("vtab", "--run", "RUN", "--threads", 0), "--threads must be from 1 to 1024, got 0"),
        (("vtab", "--run", "RUN", "--device", "foo"), "device must be cpu or cuda, got 'foo'"),
        (("vtab", "--run", "RUN", "--model", "nowhere"), "nowhere must be a folder with a config"),
    ],
)
def test_a_bad_request_is_one_line_and_2(
    words: tuple[object, ...],
    said: str,
    runs: dict[str, HostResult],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = runs["vtab"].folder.path
    assert run("evaluate", *(path if word == "RUN" else word for word in words), "--quiet") == 2
    error = capsys.readouterr().err
    assert error.startswith("llama-adapter evaluate: error: ")
    assert said in error
    assert error.count("\n") == 1


def test_runs_of_other_kinds_or_not_at_their_end_are_refused(
    runs: dict[str, HostResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs["vtab"].folder.path, copy)
    (copy / "adapter.safetensors").unlink()
    assert run("evaluate", "vtab", "--run", copy, "--quiet") == 2
    assert "does not exist: the run has not come to its end" in capsys.readouterr().err
    (copy / "task.json").unlink()
    assert run("evaluate", "vtab", "--run", copy, "--quiet") == 2
    assert "has not begun (task.json is missing)" in capsys.readouterr().err
    (copy / "config.json").write_text('{"data": "x.json"}')
    assert run("evaluate", "vtab", "--run", copy, "--quiet") == 2
    assert "is no run of finetune --host" in capsys.readouterr().err


def test_help_is_of_the_kind_of_model(capsys: pytest.CaptureFixture[str]) -> None:
    for words, has, lacks in (
        (("squad", "--help"), "--run", "--temperature"),
        (("--help",), "--temperature", "--split {test"),
    ):
        with pytest.raises(SystemExit):
            run("evaluate", *words)
        shown = capsys.readouterr().out
        assert has in shown
        assert lacks not in shown
    assert host_command.is_wanted(["vtab"])
    assert host_command.is_wanted(["--run=x", "vtab"])
    assert not host_command.is_wanted(["mme", "--data", "vtab"])
