"""VTAB-1k: 19 tasks of 1000 labelled images each, in three groups, from their own lists.

A task's folder holds train800.txt, val200.txt, train800val200.txt and test.txt, whose lines are
`relative/path.jpg label`. Settings are chosen on 800 and 200 images; then a host is trained on all
1000 and tested (VPT; LLaMA-Adapter, section 4.4, Tables 7 and 9).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_adapter.data.checked_files import FileProblem, numbered_lines, pairs, usable
from llama_adapter.multimodal.pictures import located
from llama_adapter.tasks.image_pixels import VTAB, ImageCache, ImageReader, Preparation
from llama_adapter.tasks.running import beside, evaluating
from llama_adapter.tasks.text_batches import batches

TRAIN, VALIDATION, BOTH, TEST = "train800.txt", "val200.txt", "train800val200.txt", "test.txt"
GROUPS = ("natural", "specialized", "structured")
MEAN_OF_GROUPS, OVERALL = "mean of groups", "mean of tasks"
# where nobody says how many classes there are; a head has a row of weights for each
_MOST_CLASSES = 100_000
# images that are looked at together
_TOGETHER = 64


@dataclass(frozen=True)
class VtabSource:
    """One of the 19 tasks.

    Attributes:
        name: as the papers' tables have it.
        group: one of `GROUPS`.
        classes: number of labels.
        folder: where its lists lie in the published archive.
    """

    name: str
    group: str
    classes: int
    folder: str


# in the papers' order
VTAB_TASKS: dict[str, VtabSource] = {
    source.name: source
    for source in (
        VtabSource("cifar100", "natural", 100, "cifar"),
        VtabSource("caltech101", "natural", 102, "caltech101"),
        VtabSource("dtd", "natural", 47, "dtd"),
        VtabSource("flowers102", "natural", 102, "oxford_flowers102"),
        VtabSource("pets", "natural", 37, "oxford_iiit_pet"),
        VtabSource("svhn", "natural", 10, "svhn"),
        VtabSource("sun397", "natural", 397, "sun397"),
        VtabSource("patch_camelyon", "specialized", 2, "patch_camelyon"),
        VtabSource("eurosat", "specialized", 10, "eurosat"),
        VtabSource("resisc45", "specialized", 45, "resisc45"),
        VtabSource("retinopathy", "specialized", 5, "diabetic_retinopathy"),
        VtabSource("clevr/count", "structured", 8, "clevr_count"),
        VtabSource("clevr/distance", "structured", 6, "clevr_dist"),
        VtabSource("dmlab", "structured", 6, "dmlab"),
        VtabSource("kitti/distance", "structured", 4, "kitti"),
        VtabSource("dsprites/location", "structured", 16, "dsprites_loc"),
        VtabSource("dsprites/orientation", "structured", 16, "dsprites_ori"),
        VtabSource("smallnorb/azimuth", "structured", 18, "smallnorb_azi"),
        VtabSource("smallnorb/elevation", "structured", 9, "smallnorb_ele"),
    )
}


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image, and which of a task's classes it shows.

    Attributes:
        id: its path as its list has it.
        path: where it lies.
        label: from 0.
    """

    id: str
    path: str
    label: int


def read_list(
    path: str | Path, root: str | Path, classes: int | None, problems: list[FileProblem]
) -> tuple[LabelledImage, ...]:
    """The images of one list; a problem for each line that names none.

    Args:
        path: of the list, whose lines are `relative/path.jpg label`.
        root: folder that the paths start from and may not leave.
        classes: number of labels; None takes any.
        problems: list that is added to.

    Raises:
        FileNotFoundError: there is no such list.
        ValueError: it is not UTF-8, or no line can be used.
    """
    found: dict[str, LabelledImage] = {}
    for number, line in numbered_lines(path):
        # blanks may be in a file's name
        image = _image(line.strip().rsplit(None, 1), Path(root), classes)
        if isinstance(image, LabelledImage) and image.id in found:
            image = f"image {image.id!r} is in the list already"
        if isinstance(image, str):
            problems.append(FileProblem(number, image, str(path), "line"))
        else:
            found[image.id] = image
    own = [one for one in problems if one.path == str(path)]
    return tuple(usable(found.values(), own, path)[0])


def _image(fields: list[str], root: Path, classes: int | None) -> LabelledImage | str:
    """What a line names, or why it names no image."""
    if len(fields) != 2:
        return f"must be a path and a label, got {fields[0]!r}"
    name, label = fields
    if not (label.isascii() and label.isdigit()):
        return f"label must be a number from 0, got {label!r}"
    limit = _MOST_CLASSES if classes is None else classes
    # of a number with so many digits that Python refuses to read it, those are enough
    if len(label.lstrip("0")) > len(str(limit)) or int(label) >= limit:
        return f"label must be below the {limit} classes, got {label[:20]}"
    try:
        return LabelledImage(name, str(located(name, root)), int(label))
    except (FileNotFoundError, ValueError) as error:
        return str(error)


@dataclass(frozen=True)
class VtabTask:
    """Images of one task, for ViTForImageClassification or CLIPForImageClassification.

    Attributes:
        labels: names of the classes.
        train, validation, test: its images.
        everything: the 1000 images of train800val200.txt.
        images: what reads them.
    """

    labels: tuple[str, ...]
    train: Sequence[LabelledImage]
    validation: Sequence[LabelledImage]
    test: Sequence[LabelledImage]
    everything: Sequence[LabelledImage] = field(repr=False)
    images: ImageReader = field(repr=False)
    kind: str = field(default="image-classification", init=False)
    metric: str = field(default="accuracy", init=False)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        classes: int | None = None,
        *,
        names: Sequence[str] | None = None,
        preparation: Preparation = VTAB,
        cache: ImageCache | None = None,
    ) -> tuple["VtabTask", list[FileProblem]]:
        """A task from its folder, with 800 images to train on and 200 to choose by.

        Args:
            folder: of the four lists, from which the images' paths start.
            classes: number of labels; None is that of `names`, or one more than the largest label
                of train800val200.txt.
            names: of the classes, for people; None calls them by their numbers.
            preparation: of the images; both sides are resized, whatever its edge says.
            cache: of images, the caller's; None reads them every time.

        Returns:
            The task, and what cannot be used by file and line.

        Raises:
            FileNotFoundError: a list does not exist.
            ValueError: a list has no line that can be used, or there are not as many names as
                classes.
        """
        root, problems = Path(folder), list[FileProblem]()
        count = len(names) if classes is None and names is not None else classes
        everything = read_list(root / BOTH, root, count, problems)
        if count is None:
            count = 1 + max(one.label for one in everything)
        if names is not None and len(names) != count:
            raise ValueError(f"names must be one for each of {count} classes, got {len(names)}")
        train, validation, test = (
            read_list(root / name, root, count, problems) for name in (TRAIN, VALIDATION, TEST)
        )
        labels = tuple(map(str, range(count))) if names is None else tuple(names)
        reader = ImageReader(preparation.squashed(), cache)
        return cls(labels, train, validation, test, everything, reader), problems

    def final(self) -> "VtabTask":
        """The same to train on all 1000 images, with nothing left to choose by."""
        return replace(self, train=self.everything, validation=())

    def logits(self, model: nn.Module, items: Sequence[LabelledImage]) -> Tensor:
        """What a host's head says in float32, (B, classes).

        Raises:
            ValueError: its head has another number of outputs.
        """
        pixels = beside(self.images.pixels([one.path for one in items]), model)
        found: Any = model(pixel_values=pixels)
        if found.logits.shape[-1] != len(self.labels):
            raise ValueError(
                f"the host's head must have {len(self.labels)} outputs, got "
                f"{found.logits.shape[-1]}: load it with num_labels={len(self.labels)}"
            )
        return found.logits.float()

    def loss(self, model: nn.Module, batch: Sequence[LabelledImage]) -> Tensor:
        """Mean cross-entropy of some of `train`."""
        logits = self.logits(model, batch)
        labels = torch.tensor([one.label for one in batch], device=logits.device)
        return F.cross_entropy(logits, labels)

    def predict(self, model: nn.Module, items: Sequence[LabelledImage]) -> list[int]:
        """The likeliest class of every image."""
        found: list[int] = []
        with evaluating(model):
            for some in batches(items, _TOGETHER):
                found += self.logits(model, some).argmax(-1).tolist()
        return found

    def score(
        self, items: Sequence[LabelledImage], predictions: Sequence[int]
    ) -> Mapping[str, float]:
        """Top-1 accuracy in per cent.

        Raises:
            ValueError: there is not one prediction per item, or no item.
        """
        return {self.metric: accuracy([one.label for one in items], predictions)}


def accuracy(labels: Sequence[int], predictions: Sequence[int]) -> float:
    """Share of predictions that are the label, in per cent.

    Raises:
        ValueError: there are not as many of the one as of the other, or none.
    """
    both = pairs(labels, predictions)
    return 100 * sum(label == prediction for label, prediction in both) / len(both)


def load_vtab(
    root: str | Path,
    name: str,
    *,
    preparation: Preparation = VTAB,
    cache: ImageCache | None = None,
) -> tuple[VtabTask, list[FileProblem]]:
    """One of the 19 tasks from the folder of all of them; the rest as `VtabTask.load`.

    Args:
        root: folder that holds one per task, named as `VTAB_TASKS` says.
        name: of the task, one of `VTAB_TASKS`.
        preparation: of the images.
        cache: of images, the caller's.

    Raises:
        FileNotFoundError: a list does not exist.
        ValueError: there is no such task, or a list has no line that can be used.
    """
    source = VTAB_TASKS.get(name)
    if source is None:
        raise ValueError(f"name must be one of {', '.join(VTAB_TASKS)}, got {name!r}")
    folder = Path(root) / source.folder
    return VtabTask.load(folder, source.classes, preparation=preparation, cache=cache)


def table_means(
    accuracies: Mapping[str, float], groups: Mapping[str, str] | None = None
) -> dict[str, float]:
    """The means that Tables 7 and 9 print.

    A group's is (1 / n) sum_i accuracy_i over its tasks; then there is the mean of the groups' and
    the mean of all tasks. A group without a task has none.

    Args:
        accuracies: by task, in per cent.
        groups: of the tasks, by name; None is those of `VTAB_TASKS`.

    Raises:
        ValueError: there is no task, or one has no group.
    """
    known = {name: one.group for name, one in VTAB_TASKS.items()} if groups is None else groups
    unknown = [name for name in accuracies if name not in known]
    if unknown or not accuracies:
        raise ValueError(
            f"accuracies must be of tasks among {', '.join(known)}, got "
            f"{unknown[0] if unknown else 'none'}"
        )
    means: dict[str, float] = {}
    for group in dict.fromkeys(known.values()):
        values = [value for name, value in accuracies.items() if known[name] == group]
        if values:
            means[group] = math.fsum(values) / len(values)
    of_groups = math.fsum(means.values()) / len(means)
    return {
        **means,
        MEAN_OF_GROUPS: of_groups,
        OVERALL: math.fsum(accuracies.values()) / len(accuracies),
    }
