"""`records` writes what `evaluate` asks and people answered, and `finetune` reads it so."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.cli import main
from llama_adapter.data.dataset import load_dataset
from llama_adapter.data.examples import IGNORE_INDEX
from llama_adapter.data.template import prompt_text
from llama_adapter.evaluation.records_command import NAMES
from llama_adapter.tokenizer import Tokenizer
from tests.llama_adapter.evaluation.benchmark_cases import CASES, saved

# what the made-up files of benchmark_cases.py say
TARGETS = {
    "scienceqa": [" The answer is B."] * 3,
    "vqav2": ["3", "yes"],
    "textvqa": ["open"],
    # two of its images cannot be used, which is `finetune`'s to say
    "vizwiz": ["a", "a", "soup"],
}


def run(name: str, *words: object) -> int:
    return main(["records", name, "--quiet", *map(str, words)])


def options_of(words: Any) -> dict[str, Path]:
    given = list(words)
    return {
        flag: given[place + 1] for place, flag in enumerate(given) if str(flag).startswith("--")
    }


def known(words: Any) -> list[object]:
    """The options of `records` among a case's own, whose splits are of the test."""
    wanted = ("--data", "--images", "--annotations", "--image-name", "--split", "--suffix")
    found: list[object] = [
        x for pair in options_of(words).items() if pair[0] in wanted for x in pair
    ]
    data = Path(options_of(words)["--data"])
    several = data.is_dir() or (data.suffix == ".json" and '"split"' in data.read_text())
    return [*found, "--split", "test"] if several and "--split" not in found else found


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_records_ask_what_evaluate_asks_and_name_images_below_their_folder(
    name: str, tmp_path: Path
) -> None:
    case, output = CASES[name](tmp_path), tmp_path / "made" / "train.jsonl"
    assert run(name, *known(case.words), "--output", output) == 0
    rows = read(output)
    asked = {row["prompt"] if "prompt" in row else prompt_text(row["instruction"]) for row in rows}
    assert asked >= set(case.texts.values())
    assert (asked == set(case.texts.values())) == (name != "vizwiz")
    root = Path(options_of(case.words)["--images"])
    images = {(root / row["image"]).resolve() for row in rows if "image" in row}
    assert images >= {path.resolve() for path in case.images.values()}
    answered = [row.get("completion", row.get("output", "")) for row in rows]
    assert all(answered)
    assert sorted(answered) == TARGETS.get(name, sorted(answered))
    assert run(name, *known(case.words), "--output", tmp_path / "again.jsonl") == 0
    assert (tmp_path / "again.jsonl").read_bytes() == output.read_bytes()


def test_every_caption_of_an_image_is_a_record(tmp_path: Path) -> None:
    case, output = CASES["coco_caption"](tmp_path), tmp_path / "train.jsonl"
    assert run("coco_caption", *known(case.words), "--output", output) == 0
    content = json.loads(Path(options_of(case.words)["--data"]).read_text())
    test = [image for image in content["images"] if image["split"] == "test"]
    captions = [one["raw"] for image in test for one in image["sentences"]]
    assert [row["output"] for row in read(output)] == captions


def test_a_model_trains_on_the_very_text_that_it_is_asked(
    tmp_path: Path, tiny_tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, output = CASES["scienceqa"](tmp_path), tmp_path / "train.jsonl"
    folder = options_of(case.words)["--data"]
    assert run("scienceqa", "--data", folder, "--split", "test", "--output", output) == 0
    out, err = capsys.readouterr()
    assert out == f"scienceqa, 3 records of 3 items, in {output}\n"
    assert "entry 3: question '10': answer must be an index of 3 choices, got 5" in err
    # without --images nothing of them is said
    assert all("image" not in row for row in read(output))
    tokenizer = Tokenizer(tiny_tokenizer_path)
    data = load_dataset(output, tokenizer, 4096, val_size=0, token_cache=tmp_path / "cache")
    for example, text in zip(data.train, case.texts.values(), strict=True):
        prompt = tokenizer.encode(text, bos=True)
        whole = tokenizer.encode(f"{text} The answer is B.", bos=True, eos=True)
        assert list(example.tokens) == whole
        assert list(example.labels[: len(prompt)]) == [IGNORE_INDEX] * len(prompt)
        assert list(example.labels[len(prompt) :]) == whole[len(prompt) :]


def test_what_is_trained_on_is_the_split_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES["scienceqa"](tmp_path)
    folder = Path(options_of(case.words)["--data"])
    splits = json.loads((folder / "pid_splits.json").read_text())
    saved(folder / "pid_splits.json", splits | {"train": ["8"]})
    assert run("scienceqa", "--data", folder, "--output", tmp_path / "a.jsonl") == 0
    assert [row["prompt"] for row in read(tmp_path / "a.jsonl")] == [case.texts["8"]]
    images = [
        {"split": split, "cocoid": n, "filename": f"{n}.jpg", "sentences": [{"raw": f"of {split}"}]}
        for n, split in enumerate(("train", "test", "restval", "val"))
    ]
    karpathy = saved(tmp_path / "dataset_coco.json", {"images": images})
    assert run("coco_caption", "--data", karpathy, "--output", tmp_path / "b.jsonl") == 0
    assert [row["output"] for row in read(tmp_path / "b.jsonl")] == ["of train", "of restval"]
    own = {"images": [{"id": 4, "file_name": "4.jpg"}]}
    own |= {"annotations": [{"id": 1, "image_id": 4, "caption": "of COCO"}]}
    captions = saved(tmp_path / "captions_val2014.json", own)
    assert run("coco_caption", "--data", captions, "--output", tmp_path / "c.jsonl") == 0
    assert [row["output"] for row in read(tmp_path / "c.jsonl")] == ["of COCO"]
    capsys.readouterr()


def test_what_does_not_go_together_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES["scienceqa"](tmp_path)
    own = known(case.words)
    for name, words, message in (
        ("scienceqa", [*own, "--output", tmp_path / "a.json"], "--output must be a .jsonl file"),
        ("gqa", [*own, "--output", tmp_path / "a.jsonl", "--split", "val"], "--split is no option"),
        ("scienceqa", [*own, "--output", tmp_path / "a.jsonl", "--split", "x"], "as split 'x'"),
    ):
        assert run(name, *words) == 2
        assert message in capsys.readouterr().err
    questions = {"questions": [{"image_id": 3, "question": "Is it?", "question_id": 1}]}
    unanswered = ["--data", saved(tmp_path / "q.json", questions), "--output", tmp_path / "a.jsonl"]
    assert run("vqav2", *unanswered) == 2
    assert "must have answers to train on, got none" in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()


def test_empty_answers_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training refuses a record without an output."""
    answers = (["", " ", "", "red"], ["red", "red", ""], [" ", " "])
    data = [
        {"question_id": n, "image_id": "a", "question": "What colour?", "answers": own}
        for n, own in enumerate(answers)
    ]
    path, output = saved(tmp_path / "val.json", {"data": data}), tmp_path / "train.jsonl"
    assert run("textvqa", "--data", path, "--output", output) == 0
    assert [row["output"] for row in read(output)] == ["red"]
    out, err = capsys.readouterr()
    assert out == f"textvqa, 1 records of 3 items, in {output}\n"
    assert err == "warning: 2 empty answers are left out\n"


@pytest.mark.parametrize("name", ["{", "{}{}", "{x}", "{0.x}", "{:s}", "{:012q}.jpg", "a.jpg"])
def test_a_name_of_images_must_have_a_place_for_the_number(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES["vqav2"](tmp_path)
    words = [*known(case.words), "--image-name", name, "--output", tmp_path / "a.jsonl"]
    assert run("vqav2", *words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--image-name must have one place for a number" in err
    assert f"got {name!r}" in err
