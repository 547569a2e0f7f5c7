"""Small hosts on disk and tasks in their real formats, and the options of runs on them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.llama_adapter.tasks.image_hosts import SIDE, random_vit, save_clip
from tests.llama_adapter.tasks.text_hosts import bert_tokenizer, host, roberta_tokenizer

# epochs enough for gates to leave zero, few enough for seconds
TRAINING: dict[str, Any] = {
    "epochs": 3,
    "batch_size": 6,
    "lr": 0.02,
    "prompt_length": 3,
    "save_every": 4,
    "threads": 1,
}
NAMES = ("Ana", "Bilbao", "Paris", "Ekeus", "Baghdad", "Ruiz")


def save_text_host(folder: Path, kind: str = "roberta") -> Path:
    """A folder of a host without a task's head, and of its tokenizer."""
    tokenizer = bert_tokenizer() if kind == "bert" else roberta_tokenizer()
    tokenizer.model_max_length = 150
    host(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_vit(folder: Path) -> Path:
    """A folder of a ViT whose head is of another task."""
    random_vit(classes=7).save_pretrained(folder)
    sizes = {"size": {"height": SIDE, "width": SIDE}, "do_resize": True}
    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**sizes, **mean}))
    return folder


def picture(path: Path, label: int, seed: int) -> None:
    """A picture of noise whose left or right half is bright."""
    pixels = np.random.default_rng(seed).integers(0, 90, (20, 26, 3))
    half = slice(0, 13) if label % 2 else slice(13, 26)
    pixels[:, half] += 150 - 60 * (label // 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def write_vtab(folder: Path) -> Path:
    """A folder of VTAB-1k's four lists, with fewer images."""
    lists: dict[str, list[str]] = {}
    for name, count in (("train800", 14), ("val200", 8), ("test", 9)):
        for place in range(count):
            path = f"images/{name}/{place}.png"
            picture(folder / path, place % 3, len(lists) * 100 + place)
            lists.setdefault(name, []).append(f"{path} {place % 3}\n")
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("".join(lines))
    return folder


def write_coop(folder: Path) -> Path:
    """A split file in CoOp's form, of four classes; its images start from its folder."""
    split: dict[str, list[Any]] = {}
    for name, count in (("train", 4), ("val", 2), ("test", 3)):
        for label, text in enumerate(("left dark", "right dark", "left light", "right light")):
            for place in range(count):
                path = f"{name}/{label}-{place}.png"
                picture(folder / path, label, 1000 * label + place)
                split.setdefault(name, []).append([path, label, text])
    (folder / "split_zhou_Halves.json").write_text(json.dumps(split))
    return folder


def write_squad(path: Path, count: int, version_2: bool = False) -> Path:
    """Questions for a name in a sentence; of version 2.0 every third has no answer."""
    paragraphs = []
    for place in range(count):
        name, other = NAMES[place % 6], NAMES[(place + 2) % 6]
        context = f"The engineer {name} went to the bridge of {other} in {1900 + place}."
        answers = [{"text": name, "answer_start": context.index(name)}]
        question: dict[str, Any] = {
            "id": f"q{place}", "question": "Who went to the bridge?", "answers": answers,
        }  # fmt: skip
        if version_2:
            question["is_impossible"] = place % 3 == 0
            question["answers"] = [] if place % 3 == 0 else answers
        paragraphs.append({"context": context, "qas": [question]})
    version = "v2.0" if version_2 else "1.1"
    data = [{"title": "Bridges", "paragraphs": paragraphs}]
    path.write_text(json.dumps({"version": version, "data": data}))
    return path


def write_conll03(path: Path, count: int) -> Path:
    """Sentences in four columns, a name in each."""
    lines = ["-DOCSTART- -X- -X- O", ""]
    for place in range(count):
        name, town = NAMES[place % 6], NAMES[(place + 3) % 6]
        lines += [f"{name} NNP I-NP B-PER", "saw VBD I-VP O", f"{town} NNP I-NP B-LOC"]
        lines += [". . O O", ""]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_roles(path: Path, count: int) -> Path:
    """Sentences in one line each, with the roles of one predicate."""
    lines = []
    for place in range(count):
        name, town = NAMES[place % 6], NAMES[(place + 1) % 6]
        lines.append(f"1 {name} saw {town} . ||| B-A0 B-V B-A1 O\n")
    path.write_text("".join(lines))
    return path


def options_of(task: str, folder: Path) -> dict[str, Any]:
    """Options of a run on a task, whose host and files are made in a folder once."""
    made = folder / task
    text = {"max_length": 48}
    if task == "vtab":
        if not made.exists():
            save_vit(made / "vit")
            write_vtab(made / "shades")
        own = {"host": "vit", "model": made / "vit", "data": made / "shades"}
    elif task == "base_to_novel":
        if not made.exists():
            write_coop(made)
            save_clip(made / "clip")
        own = {"host": "clip", "model": made / "clip", "data": made / "split_zhou_Halves.json"}
        own |= {"images": made, "shots": 3, "template": "{}"}
    elif task == "squad":
        if not made.exists():
            save_text_host(made / "roberta")
            write_squad(made / "train.json", 14)
            write_squad(made / "dev.json", 7)
        own = {"host": "roberta", "model": made / "roberta", "data": made / "train.json"}
        own |= {"test_data": (made / "dev.json",), "stride": 8, **text}
    else:
        kind = "bert" if task == "conll12" else "roberta"
        write = write_conll03 if task in ("conll03", "conll04") else write_roles
        if not made.exists():
            save_text_host(made / kind, kind)
            for name, count in (("train", 14), ("dev", 6), ("test", 7), ("brown", 4)):
                write(made / f"{name}.txt", count)
        own = {"host": kind, "model": made / kind, "data": made / "train.txt", **text}
        tests = ("test.txt", "brown.txt") if task == "conll05" else ("test.txt",)
        own |= {"val_data": made / "dev.txt", "test_data": tuple(made / name for name in tests)}
    return {"task": task, **TRAINING, **own}


def words_of(options: dict[str, Any]) -> list[str]:
    """The same as words of a command line."""
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            several = value if isinstance(value, tuple) else (value,)
            words += [flag, *map(str, several)]
    return words
