"""VTAB-1k's own lists are read or named line by line; ViT and CLIP learn and are scored by them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from llama_adapter.data.checked_files import FileProblem
from llama_adapter.hosts import adapt
from llama_adapter.tasks.image_pixels import ImageCache, ImageReader, Preparation
from llama_adapter.tasks.task import Task
from llama_adapter.tasks.vtab import (
    GROUPS,
    MEAN_OF_GROUPS,
    OVERALL,
    VTAB_TASKS,
    VtabTask,
    accuracy,
    load_vtab,
    read_list,
    table_means,
)
from tests.llama_adapter.tasks.image_hosts import (
    SIDE,
    noise,
    random_clip_classifier,
    random_vit,
)

SMALL = Preparation((SIDE, SIDE))
# Table 9 of LLaMA-Adapter: the rows of VPT and zero-init
VPT = (78.8, 90.8, 65.8, 98.0, 88.3, 78.1, 49.6, 81.8, 96.1, 83.4, 68.4, 68.5, 60.0, 46.5, 72.8,
       73.6, 47.9, 32.9, 37.7)  # fmt: skip
ZERO = (82.2, 92.4, 70.3, 98.4, 89.8, 84.9, 54.3, 83.6, 95.3, 85.0, 73.8, 69.3, 60.2, 51.1, 79.7,
        80.7, 49.0, 30.6, 33.6)  # fmt: skip


def write_task(folder: Path, classes: int = 3, train: int = 8, validation: int = 4) -> Path:
    """The four lists and their pictures, in the folders of the published archive."""
    counts = {"train800": train, "val200": validation, "test": 5}
    lines: dict[str, list[str]] = {}
    for name, count in counts.items():
        for n in range(count):
            path = f"images/{name}/{n:06}.png"
            noise(folder / path, 100 * len(name) + n, (26 + n, 31))
            lines.setdefault(name, []).append(f"{path} {n % classes}")
    lines["train800val200"] = lines["train800"] + lines["val200"]
    for name, rows in lines.items():
        (folder / f"{name}.txt").write_text("\n".join(rows) + "\n")
    return folder


def test_the_papers_tasks() -> None:
    assert [one.group for one in VTAB_TASKS.values()] == [
        *["natural"] * 7, *["specialized"] * 4, *["structured"] * 8
    ]  # fmt: skip
    assert [one.classes for one in VTAB_TASKS.values()] == [
        100, 102, 47, 102, 37, 10, 397, 2, 10, 45, 5, 8, 6, 6, 4, 16, 16, 18, 9
    ]  # fmt: skip
    assert len({one.folder for one in VTAB_TASKS.values()}) == 19


def test_the_means_that_table_9_prints() -> None:
    means = table_means(dict(zip(VTAB_TASKS, ZERO, strict=True)))
    assert [*means] == [*GROUPS, MEAN_OF_GROUPS, OVERALL]
    assert [round(means[group], 1) for group in GROUPS] == [81.8, 84.4, 56.8]
    assert abs(means[MEAN_OF_GROUPS] - (81.757 + 84.425 + 56.775) / 3) < 1e-3
    assert abs(means[OVERALL] - sum(ZERO) / 19) < 1e-9
    other = table_means(dict(zip(VTAB_TASKS, VPT, strict=True)))
    assert [round(other[group], 1) for group in GROUPS] == [78.5, 82.4, 55.0]


def test_means_of_some_tasks_and_of_ones_own() -> None:
    assert table_means({"dtd": 60.0, "eurosat": 90.0}) == {
        "natural": 60.0, "specialized": 90.0, MEAN_OF_GROUPS: 75.0, OVERALL: 75.0
    }  # fmt: skip
    own = {"shapes": "natural", "count": "structured", "size": "structured"}
    means = table_means({"shapes": 90.0, "count": 30.0, "size": 60.0}, own)
    assert means == {"natural": 90.0, "structured": 45.0, MEAN_OF_GROUPS: 67.5, OVERALL: 60.0}
    with pytest.raises(ValueError, match=r"got cifar10$"):
        table_means({"cifar10": 1.0})
    with pytest.raises(ValueError, match=r"got none$"):
        table_means({})


def test_a_task_is_read_and_then_trained_on_all_thousand(tmp_path: Path) -> None:
    task, problems = VtabTask.load(write_task(tmp_path), 3, preparation=SMALL)
    checked: Task = task
    assert not problems
    assert checked.kind == "image-classification"
    assert task.labels == ("0", "1", "2")
    assert [len(task.train), len(task.validation), len(task.test)] == [8, 4, 5]
    assert task.train[1].id == "images/train800/000001.png"
    assert Path(task.train[1].path).is_file()
    assert [one.label for one in task.test] == [0, 1, 2, 0, 1]
    final = task.final()
    assert [*final.train] == [*task.train, *task.validation]
    assert final.validation == ()
    assert final.test == task.test


def test_classes_are_counted_or_named(tmp_path: Path) -> None:
    write_task(tmp_path)
    assert VtabTask.load(tmp_path)[0].labels == ("0", "1", "2")
    names = ["circle", "square", "star"]
    assert VtabTask.load(tmp_path, names=names)[0].labels == tuple(names)
    with pytest.raises(ValueError, match="one for each of 4 classes, got 3"):
        VtabTask.load(tmp_path, 4, names=names)


def test_lines_that_name_no_image_are_named(tmp_path: Path) -> None:
    write_task(tmp_path)
    noise(tmp_path / "a name.png", 1)
    path = tmp_path / "train800.txt"
    path.write_text(
        "a name.png 2\n\nimages/train800/000000.png\nimages/train800/000000.png x\n"
        "images/train800/000000.png 3\nimages/absent.png 0\n../outside.png 0\n"
        "images/train800/000001.png -1\na name.png 1\nimages/train800/000001.png\t1\n"
    )
    problems: list[FileProblem] = []
    found = read_list(path, tmp_path, 3, problems)
    assert [(one.id, one.label) for one in found] == [
        ("a name.png", 2),
        ("images/train800/000001.png", 1),
    ]
    told = [str(one).removeprefix(f"{path}: ") for one in problems]
    assert told == [
        "line 3: must be a path and a label, got 'images/train800/000000.png'",
        "line 4: label must be a number from 0, got 'x'",
        "line 5: label must be below the 3 classes, got 3",
        f"line 6: image {tmp_path}/images/absent.png: no such file",
        f"line 7: image '../outside.png' must lie in {tmp_path}, got {tmp_path.parent}/outside.png",
        "line 8: label must be a number from 0, got '-1'",
        "line 9: image 'a name.png' is in the list already",
    ]


@pytest.mark.parametrize("label", ["100000", "99999999999", "9" * 5000])
def test_a_label_that_no_head_has_room_for_is_named(label: str, tmp_path: Path) -> None:
    noise(tmp_path / "a.png", 1)
    noise(tmp_path / "b.png", 1)
    path = tmp_path / "list.txt"
    path.write_text(f"a.png 0007\nb.png {label}\n")
    problems: list[FileProblem] = []
    assert [one.label for one in read_list(path, tmp_path, None, problems)] == [7]
    assert "label must be below the 100000 classes, got " in str(problems[0])


def test_a_list_without_images_is_an_error(tmp_path: Path) -> None:
    write_task(tmp_path)
    (tmp_path / "val200.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"val200.txt: nothing in it can be used: it is empty"):
        VtabTask.load(tmp_path, 3)
    (tmp_path / "val200.txt").write_text("a 0\n")
    with pytest.raises(ValueError, match=r"val200.txt: line 1: image .*/a: no such file"):
        VtabTask.load(tmp_path, 3)
    (tmp_path / "val200.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"val200.txt: no such file"):
        VtabTask.load(tmp_path, 3)


def test_one_of_the_19_by_its_name(tmp_path: Path) -> None:
    write_task(tmp_path / "dsprites_loc", classes=2)
    task, _ = load_vtab(tmp_path, "dsprites/location", preparation=SMALL)
    assert len(task.labels) == 16
    with pytest.raises(ValueError, match=r"name must be one of cifar100, .*got 'dsprites'"):
        load_vtab(tmp_path, "dsprites")


@pytest.mark.parametrize("host", [random_vit, random_clip_classifier])
def test_a_host_is_given_squashed_pixels_and_scored(host: Any, tmp_path: Path) -> None:
    cut = Preparation((SIDE, SIDE), edge=SIDE + 6)
    task, _ = VtabTask.load(write_task(tmp_path), 3, preparation=cut, cache=ImageCache())
    model = host(3)
    images = [Image.open(one.path).resize((SIDE, SIDE), 2) for one in task.test]
    raw = torch.stack([torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8).view(
        SIDE, SIDE, 3).permute(2, 0, 1) for one in images])  # fmt: skip
    pixels = (raw / 255 - torch.tensor(cut.mean).view(3, 1, 1)) / torch.tensor(cut.std).view(
        3, 1, 1
    )
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
    labels = torch.tensor([one.label for one in task.test])
    torch.testing.assert_close(task.loss(model, task.test), F.cross_entropy(logits, labels))
    model.train()
    predictions = task.predict(model, task.test)
    assert model.training
    assert predictions == logits.argmax(-1).tolist()
    right = 100 * (logits.argmax(-1) == labels).float().mean().item()
    assert abs(task.score(task.test, predictions)["accuracy"] - right) < 1e-4


def test_a_loss_trains_the_host(tmp_path: Path) -> None:
    task, _ = VtabTask.load(write_task(tmp_path), 3, preparation=SMALL, cache=ImageCache())
    model = random_vit(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = None
    for _ in range(60):
        loss = task.loss(model, task.train)
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert task.loss(model, task.train).item() < 0.5 * (first or 0)
    assert task.score(task.train, task.predict(model, task.train))["accuracy"] > 80


@pytest.mark.parametrize("host", [random_vit, random_clip_classifier])
def test_an_adapter_is_trained_and_the_host_stays(host: Any, tmp_path: Path) -> None:
    task, _ = VtabTask.load(write_task(tmp_path), 3, preparation=SMALL, cache=ImageCache())
    model = host(3)
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = adapt(model, prompt_length=4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        adapter.gates.normal_(std=1.5, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.02)
    losses = []
    for _ in range(40):
        loss = task.loss(model, task.train)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert adapter.prompts.grad is not None
        assert all(bool(row.any()) for row in adapter.prompts.grad)
    # noise with random labels before a random host: what there is to learn is little
    assert losses[-1] < losses[0]
    changed = [
        name
        for name, value in model.state_dict().items()
        if name in frozen and not torch.equal(value, frozen[name])
    ]
    assert all(name.startswith("classifier") for name in changed)


def test_more_images_than_are_looked_at_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, _ = VtabTask.load(write_task(tmp_path), 3, preparation=SMALL)
    model = random_vit(3)
    expected = task.predict(model, task.train)
    monkeypatch.setattr("llama_adapter.tasks.vtab._TOGETHER", 3)
    assert task.predict(model, task.train) == expected


def test_a_head_of_another_task_is_refused(tmp_path: Path) -> None:
    task, _ = VtabTask.load(write_task(tmp_path), 3, preparation=SMALL)
    with pytest.raises(ValueError, match="must have 3 outputs, got 4: load it with num_labels=3"):
        task.loss(random_vit(4), task.train)


def test_a_host_in_half_precision_is_given_its_own(tmp_path: Path) -> None:
    task, _ = VtabTask.load(write_task(tmp_path), 3, preparation=SMALL)
    loss = task.loss(random_vit(3).to(torch.bfloat16), task.train)
    assert loss.dtype == torch.float32
    assert bool(loss.isfinite())


def test_accuracy_is_of_as_many_predictions() -> None:
    assert accuracy([0, 1, 2, 2], [0, 2, 2, 2]) == 75.0
    with pytest.raises(ValueError, match="one for each of 2 items"):
        accuracy([0, 1], [0])
    with pytest.raises(ValueError, match="at least one"):
        accuracy([], [])


def test_images_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    task, _ = VtabTask.load(write_task(tmp_path), 3, preparation=SMALL)
    Path(task.train[0].path).write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"000000.png: no image that can be read"):
        task.loss(random_vit(3), task.train)
    assert isinstance(task.images, ImageReader)
