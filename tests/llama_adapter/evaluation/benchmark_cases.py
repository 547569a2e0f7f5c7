"""Every benchmark in small: files in its form, what is asked, scripted answers, scores by hand.

Pictures are real ones, so that an encoder can see them; some entries are malformed.
"""

import base64
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_adapter.data.template import prompt_text
from llama_adapter.evaluation.judge import SYSTEM, prompt
from tests.llama_adapter.clip_models import picture

# stands for what a run calls its model, which a digest of the adapter is part of
CALLED = "CALLED"
ASK = "Please answer yes or no."
CAPTION = prompt_text("Generate caption for this image")


@dataclass(frozen=True)
class Case:
    """One benchmark.

    Attributes:
        words: options behind its name.
        texts: the whole prompt of every item that is asked, by id.
        images: each item's picture.
        answers: scripted ones.
        scores: what those are worth.
        result: file of the official form, below the run's folder, and what it must hold.
        problems: parts of the lines about what cannot be used.
    """

    words: Sequence[object]
    texts: dict[str, str]
    images: dict[str, Path]
    answers: dict[str, str]
    scores: dict[str, float]
    result: tuple[str, Any] | None = None
    problems: Sequence[str] = field(default_factory=tuple)


def saved(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def table(path: Path, columns: Sequence[str], rows: list[list[str]], tab: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=tab).writerows([columns, *rows])
    return path


def pictures(folder: Path, *names: str) -> list[Path]:
    """One picture a name, all different."""
    found = []
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        found.append(picture(path, size=(25 + 7 * number, 33)))
    return found


def scienceqa(folder: Path) -> Case:
    def problem(subject: str, grade: str, hint: str, image: str | None) -> dict[str, Any]:
        return {
            "question": "Which  is it?", "choices": ["iron", "wood", "tin"], "answer": 1,
            "hint": hint, "image": image, "task": "closed choice", "grade": grade,
            "subject": subject, "topic": "physics", "category": "Materials", "skill": "Compare",
            "lecture": "A lecture.", "solution": "A solution.", "split": "test",
        }  # fmt: skip

    found = {
        "7": problem("natural science", "grade2", "A hint.", "image.png"),
        "8": problem("social science", "grade9", "", None),
        "9": problem("natural science", "grade9", "", "image.png"),
        "10": problem("language science", "grade12", "", None) | {"answer": 5},
    }
    saved(folder / "problems.json", found)
    saved(folder / "pid_splits.json", {"train": [], "minitest": ["9"], "test": list(found)})
    seven, nine = pictures(folder / "pictures/test", "7/image.png", "9/image.png")
    options = "(A) iron (B) wood (C) tin"
    texts = {
        "7": f"Question: Which is it?\nContext: A hint.\nOptions: {options}\nAnswer:",
        "8": f"Question: Which is it?\nContext: N/A\nOptions: {options}\nAnswer:",
    }
    texts["9"] = texts["8"]
    answers = {"7": "The answer is B.", "8": "The answer is (C).", "9": "wood"}
    results = {"7": 1, "8": 2, "9": -1}
    return Case(
        ("--data", folder, "--images", folder / "pictures", "--fallback", "wrong"),
        texts,
        {"7": seven, "9": nine},
        answers,
        {"NAT": 50, "SOC": 0, "LAN": -1, "TXT": 100, "IMG": 50, "NO": 0, "G1-6": 100, "Avg": 33.33},
        ("results.json", {"correct": 1, "count": 3, "results": results, "outputs": answers}),
        ("entry 3: question '10': answer must be an index of 3 choices, got 5",),
    )


def mme(folder: Path) -> Case:
    found: dict[str, Path] = {}
    (folder / "code_reasoning").mkdir(parents=True)
    names = ("existence", "count", "position", "color", "posters", "celebrity", "scene")
    for task in (*names, "landmark", "artwork", "OCR"):
        (folder / task).mkdir()
    for task in ("commonsense_reasoning", "numerical_calculation", "text_translation"):
        (folder / task).mkdir()
    for task, inner, suffix in (("existence", True, "jpg"), ("code_reasoning", False, "png")):
        home = folder / task
        texts, images = (home / "questions_answers_YN", home / "images") if inner else (home, home)
        texts.mkdir(exist_ok=True)
        (found[task],) = pictures(images, f"1.{suffix}")
        (texts / "1.txt").write_text(f"Is it? {ASK}\tYes\nIs it not? {ASK}\tNo\n")
    (folder / "existence/questions_answers_YN/2.txt").write_text(f"Alone? {ASK}\tYes\n")
    ids = [f"{task}/1/{n}" for task in found for n in (1, 2)]
    asked = [prompt_text(f"{text} {ASK}") for text in ("Is it?", "Is it not?")] * 2
    said = ["Yes, it is", "no.", "yes", "It is\tyes"]
    return Case(
        ("--data", folder),
        dict(zip(ids, asked, strict=True)),
        {name: found[name.split("/")[0]] for name in ids},
        dict(zip(ids, said, strict=True)),
        {"existence": 200, "code_reasoning": 50, "code_reasoning/acc": 0.5},
        (
            "mme/code_reasoning.txt",
            f"1.png\tIs it? {ASK}\tYes\tyes\n1.png\tIs it not? {ASK}\tNo\tIt is yes\n",
        ),
        ("2.txt: pair 1: must hold 2 usable questions, got 1", "2.jpg or .png: no such file"),
    )


def mmbench(folder: Path) -> Case:
    columns = [
        "index",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "l2-category",
        "image",
        "source",
        "split",
    ]
    one, two = pictures(folder, "a.png", "b.png")
    content = [base64.b64encode(path.read_bytes()).decode() for path in (one, two)]
    kinds = ["leaf", "logic_reasoning"], ["leaf", "coarse_perception"]
    rows = [
        ["5", "Which?", "Look.", "dog", "cat", "", "", "B", *kinds[0], content[0], "s", "dev"],
        ["1000005", "Which?", "Look.", "cat", "dog", "", "", "A", *kinds[0], "5", "s", "dev"],
        ["6", "Who?", "", "me", "you", "", "", "A", *kinds[1], content[1], "s", "dev"],
        ["1000006", "Who?", "", "you", "me", "", "", "B", *kinds[1], "6", "s", "dev"],
        ["8", "", "", "me", "you", "", "", "A", *kinds[1], "6", "s", "dev"],
    ]
    path = table(folder / "dev.tsv", columns, rows, "\t")

    def asked(hint: str, question: str, a: str, b: str) -> str:
        return prompt_text(
            f"{hint}Question: {question}\nOptions:\nA. {a}\nB. {b}\n"
            "Please select the correct answer from the options above. \n"
        )

    return Case(
        ("--data", path),
        {
            "5": asked("Hint: Look.\n", "Which?", "dog", "cat"),
            "1000005": asked("Hint: Look.\n", "Which?", "cat", "dog"),
            "6": asked("", "Who?", "me", "you"),
            "1000006": asked("", "Who?", "you", "me"),
        },
        {"5": one, "1000005": one, "6": two, "1000006": two},
        {"5": "B", "1000005": "It is a cat", "6": "(A)", "1000006": "A"},
        {"Overall": 0.5, "LR": 1, "CP": 0, "vanilla": 1, "vanilla all": 0.75},
        ("mmbench.tsv", ["B", "leaf\tlogic_reasoning\tB\tB\n"][1]),
        ("line 6: question is empty",),
    )


def pope(folder: Path) -> Case:
    one, two = pictures(folder / "val2014", "a.jpg", "b.jpg")
    rows = [
        {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"},
        {"question_id": 2, "image": "a.jpg", "text": "Is there a cat?", "label": "no"},
        {"question_id": 3, "image": "b.jpg", "text": "Is there a car?", "label": "yes"},
        {"question_id": 4, "image": "b.jpg", "text": "Is there?", "label": "maybe"},
    ]
    questions = [str(row["text"]) for row in rows[:3]]
    answers = {"1": "Yes, there is.", "2": "There is", "3": "No"}
    official = [
        {"question": asked, "answer": said}
        for asked, said in zip(questions, answers.values(), strict=True)
    ]
    return Case(
        ("--data", lines(folder / "pope.json", rows), "--images", folder / "val2014"),
        {str(n): prompt_text(text) for n, text in enumerate(questions, 1)},
        {"1": one, "2": one, "3": two},
        answers,
        {"accuracy": 1 / 3, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 2 / 3},
        ("answers.jsonl", "".join(f"{json.dumps(row)}\n" for row in official)),
        ("line 4: label must be yes or no, got 'maybe'",),
    )


def c_vqa(folder: Path) -> Case:
    one, two = pictures(folder / "images", "a.jpg", "b.jpg")
    columns = ["img_path", "query", "answer", "new query", "new answer", "type"]
    rows = [
        ["a.jpg", "How many dogs?", "3", "If one left, how many?", "2", "direct"],
        ["b.jpg", "How many cups?", "2", "If two came, how many?", "4", "direct"],
        ["b.jpg", "How many cups?", "two", "If two came, how many?", "4", "direct"],
    ]
    kinds = ("original", "counterfactual")
    ids = [f"{row}/{kind}" for row in (0, 1) for kind in kinds]
    asked = [rows[row][column] for row in (0, 1) for column in (1, 3)]
    return Case(
        ("--data", table(folder / "real.csv", columns, rows), "--images", folder / "images"),
        {name: prompt_text(text) for name, text in zip(ids, asked, strict=True)},
        dict(zip(ids, [one, one, two, two], strict=True)),
        dict(zip(ids, ["There are three.", "If one left, 2", "2", "some"], strict=True)),
        {"direct original": 100, "direct counterfactual": 50, "direct loss": 50},
        ("responses.csv", 'b.jpg,How many cups?,2,"If two came, how many?",4,direct,2,some\n'),
        ("line 4: answer of type direct must be a whole number, got 'two'",),
    )


def coco_caption(folder: Path) -> Case:
    names = [f"COCO_val2014_{n:012d}.jpg" for n in (3, 4, 5)]
    found = pictures(folder / "images/val2014", *names)
    said = ["a green dog runs fast now", "two small birds sit here today", "the old red car stands"]
    images = [
        {
            "filepath": "val2014", "sentids": [n], "filename": name, "imgid": n, "split": split,
            "cocoid": n,
            "sentences": [{"tokens": raw.split(), "raw": raw, "imgid": n, "sentid": n}],
        }
        for n, name, split, raw in zip(
            (3, 4, 5, 6), [*names, "x.jpg"], ["test"] * 3 + ["train"], [*said, "a"], strict=True
        )
    ]  # fmt: skip
    images.append(dict(images[0], sentences=[]))
    ids = ["3", "4", "5"]
    return Case(
        (
            *("--data", saved(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})),
            *("--images", folder / "images"),
        ),
        dict.fromkeys(ids, CAPTION),
        dict(zip(ids, found, strict=True)),
        dict(zip(ids, said, strict=True)),
        # each caption is its one reference, of which no word is another's
        {"bleu_4": 1, "cider": 10},
        (
            "captions_results.json",
            [{"image_id": int(n), "caption": text} for n, text in zip(ids, said, strict=True)],
        ),
        ("images 4: sentences is empty",),
    )


def people(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_id": n} for n, text in enumerate(answers, 1)]


def _vqa_of_numbers(folder: Path) -> Case:
    (one,) = pictures(folder / "val2014", "COCO_val2014_000000000009.jpg")
    questions = [
        {"image_id": 9, "question": "How many dogs?", "question_id": 91},
        {"image_id": 9, "question": "Is it red?", "question_id": 92},
        {"image_id": 9, "question": " ", "question_id": 93},
    ]
    annotations = [
        {"question_id": 91, "answer_type": "number", "answers": people(*["2"] * 3, *["3"] * 7)},
        {"question_id": 92, "answer_type": "yes/no", "answers": people(*["yes"] * 10)},
    ]
    return Case(
        (
            *("--data", saved(folder / "questions.json", {"questions": questions})),
            *("--annotations", saved(folder / "people.json", {"annotations": annotations})),
            *("--images", folder / "val2014"),
        ),
        {"91": prompt_text("How many dogs?"), "92": prompt_text("Is it red?")},
        {"91": one, "92": one},
        {"91": "two", "92": "No."},
        # leave-one-out: of ten subsets seven hold all three, three hold two
        {"accuracy": 0.45, "accuracy/number": 0.9, "accuracy/yes/no": 0},
        (
            "results.json",
            [{"question_id": 91, "answer": "two"}, {"question_id": 92, "answer": "No."}],
        ),
        ("questions 2: question is empty",),
    )


def textvqa(folder: Path) -> Case:
    (one,) = pictures(folder / "images", "x1.jpg")
    row = {"question_id": 1, "image_id": "x1", "question": "What does it say?"}
    data = [{**row, "answers": ["open"] * 10}, {**row, "question_id": 2, "answers": []}]
    return Case(
        (
            *("--data", saved(folder / "val.json", {"data": data}), "--images", folder / "images"),
            *("--suffix", "Answer with one word."),
        ),
        {"1": prompt_text("What does it say? Answer with one word.")},
        {"1": one},
        {"1": "Open"},
        {"accuracy": 1},
        ("results.json", [{"question_id": 1, "answer": "Open"}]),
        ("data 1: answers is empty",),
    )


def vizwiz(folder: Path) -> Case:
    (one,) = pictures(folder / "images", "v.jpg")
    data = [
        {"image": "v.jpg", "question": "Which can?", "answers": people(*["soup"] * 10)},
        {"image": "../out.jpg", "question": "Which?", "answers": people("a")},
        {"image": "absent.jpg", "question": "Which?", "answers": people("a")},
    ]
    return Case(
        ("--data", saved(folder / "val.json", data), "--images", folder / "images"),
        {"v.jpg": prompt_text("Which can?")},
        {"v.jpg": one},
        {"v.jpg": "a can of soup"},
        {"accuracy": 0},
        ("results.json", [{"image": "v.jpg", "answer": "a can of soup"}]),
        (
            "item 1: image '../out.jpg' must lie in",
            "images/absent.jpg: no such file, of item 'absent.jpg'",
        ),
    )


def gqa(folder: Path) -> Case:
    (one,) = pictures(folder / "images", "4.jpg")
    data = {
        "a1": {"imageId": "4", "question": "Is it a dog?", "answer": "yes"},
        "a2": {"imageId": "4", "question": "Who?", "answer": 3},
    }
    return Case(
        ("--data", saved(folder / "val.json", data), "--images", folder / "images"),
        {"a1": prompt_text("Is it a dog?")},
        {"a1": one},
        {"a1": "Yes."},
        {"accuracy": 1},
        ("results.json", [{"questionId": "a1", "prediction": "Yes."}]),
        ("question 1: answer must be a string, got a number",),
    )


def lvlm_ehub(folder: Path) -> Case:
    (one,) = pictures(folder / "images", "x/1.jpg")
    row = {"question": "Read it.", "image_path": "x/1.jpg"}
    data = [{**row, "gt_answers": "red door"}, {**row, "gt_answers": []}]
    return Case(
        (
            *("--data", saved(folder / "SROIE.json", data), "--images", folder / "images"),
            *("--metric", "kie"),
        ),
        {"0": prompt_text("Read it.")},
        {"0": one},
        {"0": "a red house"},
        {"precision": 1 / 3, "recall": 0.5, "f1": 0.4},
        (
            "results.json",
            [
                {
                    "question": "Read it.", "answer": "a red house", "gt_answers": "red door",
                    "image_path": "x/1.jpg", "model_name": CALLED,
                }
            ],
        ),
        ("entry 1: gt_answers is empty",),
    )  # fmt: skip


def questions(folder: Path) -> Case:
    rows = [
        {"question_id": 1, "text": "How are you?", "category": "generic"},
        {"question_id": 2, "text": "", "category": "math"},
        {"question_id": 3, "text": "What is 2?", "category": "math"},
    ]
    answers = {"1": "Fine, thanks.", "3": "A number"}
    official = [
        {
            "answer_id": f"{CALLED}-{n}", "question_id": int(n), "model_id": CALLED,
            "text": text, "metadata": {},
        }
        for n, text in answers.items()
    ]  # fmt: skip
    return Case(
        ("--data", lines(folder / "question.jsonl", rows), "--temperature", 0),
        {"1": prompt_text("How are you?"), "3": prompt_text("What is 2?")},
        {},
        answers,
        {"words": 2},
        ("answer.jsonl", "".join(f"{json.dumps(row)}\n" for row in official)),
        ("line 2: text is empty",),
    )


def judge(folder: Path) -> Case:
    rows = [{"question_id": 1, "text": "How?", "category": "generic"}]
    files = [lines(folder / "question.jsonl", rows)]
    for model in ("ours", "theirs"):
        answer = {"answer_id": f"{model}1", "question_id": 1, "model_id": model, "text": model}
        more = {"answer_id": "x", "question_id": 2, "model_id": model}
        files.append(lines(folder / f"{model}.jsonl", [answer, more]))
    return Case(
        (
            *("--data", files[0], "--answers", files[1], "--baseline", files[2]),
            *("--temperature", 0),
        ),
        {
            f"1-{n}": prompt_text(f"{SYSTEM}\n\n{prompt('How?', 'generic', *answers)}")
            for n, answers in ((1, ("ours", "theirs")), (2, ("theirs", "ours")))
        },
        {},
        {"1-1": "8 6\nours is better", "1-2": "(7, 9)\nthe second"},
        {"items_win": 2, "merged_win": 1, "malformed": 0, "win_rate": 1, "ratio": 1700 / 13},
        ("review.jsonl", '"score": [7.0, 9.0], "reviewer_id": "' + CALLED + '"'),
        ("ours.jsonl: line 2: text is missing", "theirs.jsonl: line 2: text is missing"),
    )


def exact_match(folder: Path) -> Case:
    (one,) = pictures(folder / "images", "a.png")
    rows = [
        {"instruction": "Reverse", "input": "ab", "output": "ba"},
        {"instruction": "What colour?", "output": "red", "image": "a.png"},
        {"instruction": "What?", "output": ""},
    ]
    return Case(
        ("--data", saved(folder / "heldout.json", rows), "--images", folder / "images"),
        {"0": prompt_text("Reverse", "ab"), "1": prompt_text("What colour?")},
        {"1": one},
        {"0": "ba", "1": "blue"},
        {"exact_match": 0.5},
        None,
        ("record 2: output is empty",),
    )


CASES: dict[str, Callable[[Path], Case]] = {
    "scienceqa": scienceqa,
    "mme": mme,
    "mmbench": mmbench,
    "pope": pope,
    "c_vqa": c_vqa,
    "coco_caption": coco_caption,
    "vqav2": _vqa_of_numbers,
    "okvqa": _vqa_of_numbers,
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "gqa": gqa,
    "lvlm_ehub": lvlm_ehub,
    "questions": questions,
    "judge": judge,
    "exact_match": exact_match,
}
