"""`evaluate` asks every benchmark's questions as they are to be asked, scores, resumes, refuses."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from llama_adapter.answering import Answerer, ModelOptions
from llama_adapter.cli import main
from llama_adapter.evaluation.benchmarks import BENCHMARKS
from llama_adapter.model import Llama
from llama_adapter.sampling import SamplingConfig
from llama_adapter.vision import VisionOptions
from tests.llama_adapter.clip_models import picture, save_clip, save_image_adapter
from tests.llama_adapter.conftest import save_base
from tests.llama_adapter.evaluation.benchmark_cases import CALLED, CASES, Case

FEW = 4


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def base(tiny_model: Llama, tiny_tokenizer_path: Path, tmp_path: Path) -> Path:
    """The tiny model with a context that a benchmark's prompt fits in."""
    return save_base(tmp_path / "tiny", tiny_model, tiny_tokenizer_path, 1024)


@pytest.fixture
def adapter(base: Path, clip: Path, tmp_path: Path) -> Path:
    return save_image_adapter(tmp_path / "adapter.safetensors", base, clip)


@pytest.fixture
def model(base: Path, adapter: Path, clip: Path) -> tuple[object, ...]:
    """Options that name what answers."""
    own = ("--base", base, "--adapter", adapter, "--vision-model", clip, "--device", "cpu")
    return (*own, "--max-new-tokens", FEW, "--quiet")


def run(name: str, *words: object) -> int:
    return main(["evaluate", name, *map(str, words)])


def kept(output: Path) -> dict[str, str]:
    """The predictions of a run by id."""
    rows = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    found = {row["id"]: row["prediction"] for row in rows}
    assert len(found) == len(rows), "an item was asked twice"
    return found


def script(monkeypatch: pytest.MonkeyPatch, case: Case) -> list[list[str]]:
    """Let the answers be a case's own, whatever the model; returns the texts of each call."""
    batches: list[list[str]] = []
    by_text: dict[str, list[str]] = {}
    for name, text in case.texts.items():
        by_text.setdefault(text, []).append(case.answers[name])

    def answers(
        self: Answerer, texts: Sequence[str], sampling: SamplingConfig, **more: Any
    ) -> list[str]:
        batches.append(list(texts))
        # a space in front, as a model's answer has
        return [f" {by_text[text].pop(0)}" for text in texts]

    monkeypatch.setattr(Answerer, "answers", answers)
    return batches


def test_every_benchmark_has_a_case() -> None:
    # one that predicts by itself is asked nothing
    assert [name for name, one in BENCHMARKS.items() if one.bind is None] == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_every_item_is_asked_as_the_benchmark_has_it(
    name: str, model: tuple[object, ...], base: Path, adapter: Path, clip: Path, tmp_path: Path
) -> None:
    """The model's own answers, each with its picture, are those to the texts by themselves."""
    if name in ("coco_caption", "lvlm_ehub"):
        pytest.importorskip("pycocoevalcap")
    case, output = CASES[name](tmp_path / "data"), tmp_path / "run"
    assert run(name, *case.words, "--output", output, *model, "--batch-size", 3) == 0
    found = kept(output)
    assert list(json.loads((output / "scores.json").read_text())["items"]) == list(case.answers)
    answerer = ModelOptions(base, adapter, device="cpu").load(VisionOptions(vision_model=clip))
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=FEW)
    for item, text in case.texts.items():
        (said,) = answerer.answers([text], sampling, images=[case.images.get(item)])
        assert found[item] == said.strip()
    seen = {found[item] for item, text in case.texts.items() if item in case.images}
    (blind,) = answerer.answers([next(iter(case.texts.values()), "a")], sampling)
    assert not case.images or seen != {blind.strip()}, "pictures change nothing"


@pytest.mark.parametrize("name", CASES)
def test_scores_results_and_what_cannot_be_used(
    name: str,
    model: tuple[object, ...],
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name in ("coco_caption", "lvlm_ehub"):
        pytest.importorskip("pycocoevalcap")
    case, output = CASES[name](tmp_path / "data"), tmp_path / "run"
    script(monkeypatch, case)
    assert run(name, *case.words, "--output", output, *model) == 0
    assert kept(output) == case.answers
    scores = json.loads((output / "scores.json").read_text())["scores"]
    assert {key: scores[key] for key in case.scores} == pytest.approx(case.scores)
    shown = capsys.readouterr()
    assert all(key in shown.out for key in case.scores)
    assert f"scores      {output / 'scores.json'}" in shown.out
    listed = (output / "problems.txt").read_text().splitlines()
    assert len(listed) == len(case.problems)
    for part in case.problems:
        assert sum(part in line for line in listed) == 1, part
    assert f"{len(listed)} entries cannot be used, listed in {output}/problems.txt" in shown.err
    if case.result is not None:
        digest = hashlib.sha256(adapter.read_bytes()).hexdigest()[:16]
        called = f"tiny+{adapter.parent.name}-{digest}"
        path = output / case.result[0]
        wanted = json.loads(json.dumps(case.result[1]).replace(CALLED, called))
        assert f"result      {output}" in shown.out
        if isinstance(wanted, str):
            assert wanted in path.read_text()
        elif isinstance(wanted, dict):
            content = json.loads(path.read_text())
            assert {key: content[key] for key in wanted} == wanted
        else:
            assert json.loads(path.read_text()) == wanted
    code = run(name, *case.words, "--output", tmp_path / "other", *model, "--strict")
    assert code == 2
    assert f"{len(listed)} entries cannot be used: " in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_killed_run_goes_on_where_it_stopped(
    model: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = CASES["c_vqa"](tmp_path / "data")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    own = (*case.words, *model, "--batch-size", 1, "--temperature", 0.8, "--top-p", 1)
    assert run("c_vqa", *own, "--output", whole) == 0
    asked: list[str] = []
    honest: Callable[..., list[str]] = Answerer.answers

    def killed(self: Answerer, texts: Sequence[str], *rest: Any, **more: Any) -> list[str]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.extend(texts)
        return honest(self, texts, *rest, **more)

    monkeypatch.setattr(Answerer, "answers", killed)
    assert run("c_vqa", *own, "--output", cut) == 130
    assert f"stopped: the same command goes on from {cut}" in capsys.readouterr().err
    assert len(kept(cut)) == 2
    # a line that the kill has torn
    with (cut / "predictions.jsonl").open("a") as file:
        file.write('{"id": "1/ori')
    monkeypatch.undo()
    # in other batches too
    assert run("c_vqa", *own, "--output", cut, "--batch-size", 3) == 0
    assert kept(cut) == kept(whole)
    for name in ("scores.json", "responses.csv"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    # nothing is left to ask
    monkeypatch.setattr(Answerer, "answers", None)
    assert run("c_vqa", *own, "--output", cut) == 0


def test_a_run_of_something_else_is_refused_by_name(
    model: tuple[object, ...],
    base: Path,
    clip: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case, output = CASES["pope"](tmp_path / "data"), tmp_path / "run"
    own = (*case.words, "--output", output, *model)
    assert run("pope", *own) == 0
    before = (output / "predictions.jsonl").read_bytes()
    other = save_image_adapter(tmp_path / "other.safetensors", base, clip, seed=5)
    for words, message in (
        (("--temperature", 0.5), "temperature is 0.0 there and 0.5 now"),
        (("--adapter", other), "adapter is "),
        (("--suffix", "Say it."), 'suffix is null there and "Say it." now'),
        (("--dtype", "bfloat16"), 'dtype is "float32" there and "bfloat16" now'),
        (("--blind",), "vision_model is "),
    ):
        assert run("pope", *own, *words) == 2
        shown = capsys.readouterr().err
        assert f"{output} holds another evaluation run: " in shown
        assert message in shown
    image = tmp_path / "data" / "val2014" / "b.jpg"
    content = image.read_bytes()
    picture(image, size=(60, 60))
    assert run("pope", *own) == 2
    assert 'images is "' in capsys.readouterr().err
    image.write_bytes(content)
    data = tmp_path / "data" / "pope.json"
    data.write_text(data.read_text().replace("a dog", "a fox"))
    assert run("pope", *own) == 2
    assert "items changed: 1, the first is '1'" in capsys.readouterr().err
    assert (output / "predictions.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["pope", "mmbench"])
def test_a_refused_run_changes_nothing_in_the_others_folder(
    name: str, model: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, output = CASES["c_vqa"](tmp_path / "first"), tmp_path / "run"
    assert run("c_vqa", *first.words, "--output", output, *model) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert output / "problems.txt" in before
    (tmp_path / "second").mkdir()
    second = CASES[name](tmp_path / "second")
    assert second.problems
    capsys.readouterr()
    assert run(name, *second.words, "--output", output, *model) == 2
    shown = capsys.readouterr().err
    assert "holds another evaluation run: " in shown
    assert "listed in" not in shown
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert not (output / "images").exists()


def test_a_judges_file_is_counted_without_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, output = CASES["judge"](tmp_path / "data"), tmp_path / "run"
    reviews = tmp_path / "gpt.jsonl"
    rows = [
        {"question_id": 1, "answer1_id": a, "answer2_id": b, "text": text}
        for (a, b), text in zip(
            (("ours1", "theirs1"), ("theirs1", "ours1")), case.answers.values(), strict=True
        )
    ]
    reviews.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    words = (*case.words, "--reviews", reviews, "--output", output, "--base", "absent", "--quiet")
    assert run("judge", *words) == 0
    scores = json.loads((output / "scores.json").read_text())["scores"]
    assert {key: scores[key] for key in case.scores} == pytest.approx(case.scores)
    assert '"reviewer_id": "gpt"' in (output / "review.jsonl").read_text()
    assert "judge, 2 items" in capsys.readouterr().out


def test_answers_of_two_runs_are_told_apart_in_reviews(
    base: Path, clip: Path, tmp_path: Path
) -> None:
    """Both adapters are called adapter.safetensors; the judge prefers the first one's answers."""
    data = tmp_path / "question.jsonl"
    data.write_text('{"question_id": 1, "text": "How?", "category": "generic"}\n')
    answers = []
    for seed, folder in ((1, "alpaca"), (2, "alpaca/again")):
        (tmp_path / folder).mkdir()
        file = save_image_adapter(tmp_path / folder / "adapter.safetensors", base, clip, seed=seed)
        output = tmp_path / f"answers{seed}"
        own = ("--base", base, "--adapter", file, "--vision-model", clip, "--device", "cpu")
        words = ("--data", data, "--output", output, *own, "--max-new-tokens", FEW, "--quiet")
        assert run("questions", *words) == 0
        answers.append(output / "answer.jsonl")
    rows = [json.loads(path.read_text()) for path in answers]
    assert rows[0]["model_id"].startswith("tiny+alpaca-")
    assert rows[1]["model_id"].startswith("tiny+again-")
    first, second = (row["answer_id"] for row in rows)
    reviews = tmp_path / "reviews.jsonl"
    reviews.write_text(
        "".join(
            json.dumps({"question_id": 1, "answer1_id": a, "answer2_id": b, "text": text}) + "\n"
            for a, b, text in ((second, first, "2 9"), (first, second, "8 3"))
        )
    )
    words = ("--data", data, "--answers", answers[0], "--baseline", answers[1], "--base", base)
    output = tmp_path / "judged"
    assert run("judge", *words, "--reviews", reviews, "--output", output, "--quiet") == 0
    scores = json.loads((output / "scores.json").read_text())["scores"]
    assert (scores["items_win"], scores["merged_win"], scores["malformed"]) == (2, 1, 0)


def test_a_text_that_is_too_long_is_answered_by_nothing(
    model: tuple[object, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        {"question_id": n, "text": text, "category": "a"}
        for n, text in ((1, "stone"), (2, "stone " * 600))
    ]
    data = tmp_path / "question.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    output = tmp_path / "run"
    assert run("questions", "--data", data, "--output", output, *model, "--temperature", 0) == 0
    found = kept(output)
    assert found["1"]
    assert found["2"] == ""
    assert "item '2': its prompt must have at most 1023 tokens, got " in capsys.readouterr().err


def test_without_its_answers_a_test_split_is_written_and_not_scored(
    model: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, output = CASES["mmbench"](tmp_path / "data"), tmp_path / "run"
    path = tmp_path / "data" / "dev.tsv"
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    path.write_text("".join("\t".join(row[:7] + row[8:]) + "\n" for row in rows))
    assert run("mmbench", *case.words, "--output", output, *model) == 0
    assert "no scores: the data has no answers" in capsys.readouterr().out
    assert json.loads((output / "scores.json").read_text())["scores"] == {}
    assert (output / "mmbench.tsv").read_text().count("\n") == 5


def test_a_text_adapter_does_not_need_the_images(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, output = CASES["gqa"](tmp_path / "data"), tmp_path / "run"
    own = ("--base", base, "--device", "cpu", "--max-new-tokens", FEW, "--quiet")
    assert run("gqa", *case.words[:2], "--output", output, *own) == 0
    answerer = ModelOptions(base, device="cpu").load()
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=FEW)
    (said,) = answerer.answers(list(case.texts.values()), sampling)
    assert kept(output) == {"a1": said.strip()}
    assert json.loads((output / "run.json").read_text())["settings"]["vision_model"] is None


def test_blind_answers_do_not_need_the_images(
    base: Path,
    adapter: Path,
    model: tuple[object, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case, output = CASES["mme"](tmp_path / "data"), tmp_path / "run"
    for image in case.images.values():
        image.unlink(missing_ok=True)
    assert run("mme", *case.words, "--output", output, *model, "--blind") == 0
    assert "mme, 4 items, asked without their images" in capsys.readouterr().out
    answerer = ModelOptions(base, adapter, device="cpu").load()
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=FEW)
    said = answerer.answers(list(case.texts.values()), sampling)
    assert kept(output) == dict(zip(case.texts, (text.strip() for text in said), strict=True))


def test_requests_that_cannot_be_carried_out(
    model: tuple[object, ...],
    base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = CASES["gqa"](tmp_path / "data")
    data, output = case.words[1], ("--output", tmp_path / "run")
    with monkeypatch.context() as without:
        without.setitem(__import__("sys").modules, "pycocoevalcap", None)
        without.setitem(__import__("sys").modules, "pycocoevalcap.tokenizer.ptbtokenizer", None)
        assert run("coco_caption", *case.words, *output, *model) == 2
        assert "need pycocoevalcap" in capsys.readouterr().err
    cases: list[tuple[str, tuple[object, ...], str]] = [
        ("gqa", ("--data", data, *output, *model), "--images is required, the folder that"),
        ("gqa", (*case.words, *output, *model, "--annotations", data), "--annotations is no opt"),
        ("scienceqa", (*case.words, *output, *model, "--suffix", "a"), "--suffix is no option of"),
        ("gqa", (*case.words, *output, *model, "--batch-size", 0), "--batch-size must be at least"),
        ("gqa", (*case.words, *model), "--output is required"),
        ("lvlm_ehub", (*case.words, *output, *model), "--metric is required for lvlm_ehub"),
        ("judge", ("--data", data, *output, *model), "--answers is required for judge"),
        ("gqa", ("--data", "absent", *case.words[2:], *output, *model), "absent: no such file"),
        (
            "gqa",
            (*case.words, *output, "--base", base, "--adapter", adapter, "--device", "cpu"),
            "images need --vision-model",
        ),
    ]
    for name, words, message in cases:
        assert run(name, *words) == 2, words
        shown = capsys.readouterr()
        assert message in shown.err
        assert shown.err.count("\n") == 1
    (tmp_path / "data/images/4.jpg").write_bytes(b"no picture")
    assert run("gqa", *case.words, *output, *model) == 2
    assert "none of the images can be used: " in capsys.readouterr().err
