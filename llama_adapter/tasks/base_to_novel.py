"""Base-to-novel generalisation of a CLIP: a few images of some classes teach it to tell others.

Classes are texts. Base images are told among the base classes' texts alone, novel ones among the
novel classes' alone: logits = exp(logit_scale) cos(image, text) (LLaMA-Adapter, appendix B.3).
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_adapter.data.checked_files import FileProblem, pairs
from llama_adapter.tasks.few_shot import (
    COOP_DATA,
    SHOTS,
    TEMPLATE,
    VALIDATION_SHOTS,
    NamedImage,
    Splits,
    base_and_novel,
    draw,
    read_aircraft,
    read_imagenet,
    read_split,
)
from llama_adapter.tasks.host_tokenizer import load_tokenizer
from llama_adapter.tasks.image_pixels import CLIP, ImageCache, ImageReader, Preparation
from llama_adapter.tasks.running import beside, evaluating
from llama_adapter.tasks.text_batches import batches

BASE, NOVEL, HARMONIC = "base", "novel", "harmonic_mean"
# images that are looked at together
_TOGETHER = 64


class ClassTexts:
    """The texts of some classes, and a CLIP's features of them while these do not change.

    Features are kept by whoever made this, and never of a text side that is trained: before they
    are used again the first text is looked at anew, and where its features need a gradient or
    differ in a bit from the time before, those of all texts are made anew; so they are where a
    parameter of the text side was written to, which may be of words that the first text lacks.
    """

    def __init__(self, texts: Sequence[str], input_ids: Tensor, attention_mask: Tensor) -> None:
        """Keep texts and their tokens, (classes, T) both.

        Raises:
            ValueError: there is no text.
        """
        if not texts:
            raise ValueError("texts must be of at least one class, got none")
        self.texts = tuple(texts)
        self._inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        self._first: Tensor | None = None
        self._state: tuple[tuple[int, int], ...] = ()
        self._kept: Tensor | None = None

    @classmethod
    def of(cls, names: Sequence[str], template: str, tokenizer: Any) -> "ClassTexts":
        """Texts of classes' names, in which _ is a blank.

        Args:
            names: of the classes.
            template: with one {} for a name.
            tokenizer: transformers', of a CLIP.
        """
        # other braces are the template's own
        texts = [template.replace("{}", name.replace("_", " ")) for name in names]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        return cls(texts, tokens["input_ids"], tokens["attention_mask"])

    def __call__(self, model: nn.Module) -> Tensor:
        """Features (classes, C) of length 1, differentiable where the text side is trained.

        Raises:
            ValueError: a text has more tokens than the model has positions for.
        """
        first, state = self._features(model, slice(1)), _written(model)
        known = self._first
        if (
            known is None
            or state != self._state
            or self._kept is None
            or first.requires_grad
            or first.device != known.device
            or not torch.equal(first, known)
        ):
            found = self._features(model, slice(None))
            # without gradients nothing tells whether they are trained: kept, and looked at again
            trained = found.requires_grad
            self._first, self._kept = (None, None) if trained else (first, found)
            self._state = state
            return found
        return self._kept

    def _features(self, model: Any, rows: slice) -> Tensor:
        given = {name: beside(value[rows], model) for name, value in self._inputs.items()}
        length, room = given["input_ids"].shape[1], model.config.text_config.max_position_embeddings
        if length > room:
            longest = int(self._inputs["attention_mask"].sum(-1).argmax())
            raise ValueError(
                f"text {self.texts[longest]!r} must have at most {room} tokens, got {length}"
            )
        return _unit(model.get_text_features(**given))


def _written(model: Any) -> tuple[tuple[int, int], ...]:
    """The parameters of a CLIP's text side, and how often each was written to."""
    sides = (model.text_model, model.text_projection)
    parameters = [parameter for side in sides for parameter in side.parameters()]
    # memory of inference does not count
    return tuple((id(x), -1 if x.is_inference() else x._version) for x in parameters)


def _unit(found: Any) -> Tensor:
    """Features of length 1, whether a model gives them alone or with what led to them."""
    features = found if isinstance(found, Tensor) else found.pooler_output
    return F.normalize(features.float(), dim=-1)


@dataclass(frozen=True)
class BaseToNovelTask:
    """Images of base and novel classes, for CLIPModel.

    Attributes:
        labels: none: classes are texts.
        train: a few images of every base class.
        validation: a few others of the base classes; novel ones are never chosen by.
        test: the test images of base and novel classes.
        texts: of the base classes and of the novel ones.
        images: what reads them.
        template_length: tokens in front of a name in its text, in whose place CoOp puts others.
        augment: training takes random pieces, mirrored at random, by torch's own generator.
    """

    train: Sequence[NamedImage]
    validation: Sequence[NamedImage]
    test: Sequence[NamedImage]
    names: Mapping[str, tuple[str, ...]]
    texts: Mapping[str, ClassTexts] = field(repr=False)
    images: ImageReader = field(repr=False)
    template_length: int
    augment: bool = True
    kind: str = field(default="contrastive", init=False)
    # of the validation images, which are base alone
    metric: str = field(default=BASE, init=False)
    labels: tuple[str, ...] = field(default=(), init=False)

    @classmethod
    def load(
        cls,
        split: str | Path,
        images: str | Path,
        clip: str | Path,
        *,
        template: str = TEMPLATE,
        shots: int = SHOTS,
        seed: int = 1,
        preparation: Preparation | None = None,
        augment: bool = True,
        cache: ImageCache | None = None,
    ) -> tuple["BaseToNovelTask", list[FileProblem]]:
        """A task from a split file in CoOp's form.

        Args:
            split: split_zhou_NAME.json.
            images: folder that its images' paths start from.
            clip: folder of a CLIP, whose tokenizer is taken.
            template: of a class's text, with one {}.
            shots: images of every base class to train on.
            seed: of the choice of these.
            preparation: of the images; None is what the CLIP's folder says, or else CLIP's own.
            augment: train on random pieces.
            cache: of images, the caller's; None reads them every time.

        Returns:
            The task, and what cannot be used by file and place.

        Raises:
            FileNotFoundError: a file or folder does not exist.
            ImportError: transformers is not installed.
            ValueError: the file cannot be used, there are fewer than two classes, shots are below
                1, the template has no place for a name, or the folder has no tokenizer.
        """
        splits, problems = read_split(split, images)
        options = (template, shots, seed, preparation, augment, cache)
        return cls._of(splits, clip, *options), problems

    @classmethod
    def _of(
        cls,
        splits: Splits,
        clip: str | Path,
        template: str,
        shots: int,
        seed: int,
        preparation: Preparation | None,
        augment: bool,
        cache: ImageCache | None,
    ) -> "BaseToNovelTask":
        if shots < 1:
            raise ValueError(f"shots must be at least 1, got {shots}")
        if template.count("{}") != 1:
            raise ValueError(f"template must have one {{}} for a class's name, got {template!r}")
        base, novel = base_and_novel(list(splits.names))
        if not novel:
            raise ValueError(f"classes must be at least 2, got {len(base)}")
        chance = random.Random(seed)
        # of all classes, base and novel, so that a seed draws what it draws in CoOp
        train = draw(splits.train, shots, chance)
        validation = draw(splits.validation, min(shots, VALIDATION_SHOTS), chance)
        halves = {BASE: base, NOVEL: novel}
        names = {key: tuple(splits.names[n] for n in half) for key, half in halves.items()}
        tokenizer = load_tokenizer(clip)
        prepared = Preparation.of_host(clip, CLIP) if preparation is None else preparation
        return cls(
            _only(train, base),
            _only(validation, base),
            (*_only(splits.test, base), *_only(splits.test, novel, novel=True)),
            names,
            {key: ClassTexts.of(one, template, tokenizer) for key, one in names.items()},
            ImageReader(prepared, cache),
            _length(template.partition("{}")[0], tokenizer),
            augment,
        )

    def logits(self, model: Any, pixels: Tensor, half: str) -> Tensor:
        """exp(logit_scale) cos(image, text) of pixels (B, 3, height, width), (B, classes).

        Args:
            model: a CLIPModel.
            pixels: of images.
            half: whose texts, "base" or "novel".
        """
        seen = _unit(model.get_image_features(pixel_values=beside(pixels, model)))
        texts = self.texts[half](model)
        return model.logit_scale.exp().float() * seen @ texts.T

    def loss(self, model: nn.Module, batch: Sequence[NamedImage]) -> Tensor:
        """Mean cross-entropy of some of `train` among the base classes."""
        paths = [one.path for one in batch]
        pixels = self.images.varied(paths) if self.augment else self.images.pixels(paths)
        logits = self.logits(model, pixels, BASE)
        labels = torch.tensor([one.label for one in batch], device=logits.device)
        return F.cross_entropy(logits, labels)

    def predict(self, model: nn.Module, items: Sequence[NamedImage]) -> list[int]:
        """The likeliest class of every image among those of its half."""
        found = [0] * len(items)
        with evaluating(model):
            for half in (BASE, NOVEL):
                rows = [n for n, one in enumerate(items) if one.novel == (half == NOVEL)]
                for some in batches(rows, _TOGETHER):
                    pixels = self.images.pixels([items[n].path for n in some])
                    best = self.logits(model, pixels, half).argmax(-1).tolist()
                    for n, label in zip(some, best, strict=True):
                        found[n] = label
        return found

    def score(self, items: Sequence[NamedImage], predictions: Sequence[int]) -> Mapping[str, float]:
        """Accuracy of base and of novel images in per cent, and their harmonic mean.

        Of images of one half there is that half's alone.

        Raises:
            ValueError: there is not one prediction per item, or no item.
        """
        right: dict[str, list[bool]] = {}
        for item, prediction in pairs(items, predictions):
            right.setdefault(NOVEL if item.novel else BASE, []).append(item.label == prediction)
        found = {
            half: 100 * sum(right[half]) / len(right[half])
            for half in (BASE, NOVEL)
            if half in right
        }
        if len(found) == 2:
            found[HARMONIC] = harmonic_mean(found[BASE], found[NOVEL])
        return found


def load_coop(
    root: str | Path,
    name: str,
    clip: str | Path,
    *,
    shots: int = SHOTS,
    seed: int = 1,
    preparation: Preparation | None = None,
    augment: bool = True,
    cache: ImageCache | None = None,
) -> tuple[BaseToNovelTask, list[FileProblem]]:
    """One of CoOp's eleven data sets from the folder of all; the rest as `BaseToNovelTask.load`.

    Raises:
        FileNotFoundError: a file or folder does not exist.
        ImportError: transformers is not installed.
        ValueError: there is no such data set, or its files cannot be used.
    """
    source = COOP_DATA.get(name)
    if source is None:
        raise ValueError(f"name must be one of {', '.join(COOP_DATA)}, got {name!r}")
    folder = Path(root) / source.folder
    if source.split:
        splits, problems = read_split(folder / source.split, folder / source.images)
    else:
        splits, problems = (read_imagenet if name == "ImageNet" else read_aircraft)(folder)
    task = BaseToNovelTask._of(
        splits, clip, source.template, shots, seed, preparation, augment, cache
    )
    return task, problems


def harmonic_mean(base: float, novel: float) -> float:
    """2 B N / (B + N); 0 where both are."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def averages(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over data sets, as Table 11 has them: the harmonic mean's is the mean of theirs.

    Args:
        scores: of each data set, with base and novel accuracy.

    Raises:
        ValueError: there is no data set.
    """
    if not scores:
        raise ValueError("scores must be of at least one data set, got none")
    rows = [{**one, HARMONIC: harmonic_mean(one[BASE], one[NOVEL])} for one in scores]
    return {key: math.fsum(row[key] for row in rows) / len(rows) for key in (BASE, NOVEL, HARMONIC)}


def _only(
    images: Sequence[NamedImage], labels: Sequence[int], novel: bool = False
) -> tuple[NamedImage, ...]:
    """The images of some classes, labelled by their place among these."""
    places = {label: n for n, label in enumerate(labels)}
    return tuple(
        replace(one, label=places[one.label], novel=novel) for one in images if one.label in places
    )


def _length(text: str, tokenizer: Any) -> int:
    """How many tokens a text is, without special ones."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
