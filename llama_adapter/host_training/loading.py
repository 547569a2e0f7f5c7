"""A run's host and its task, from their own files."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from llama_adapter.checkpoints import checked_device, default_device
from llama_adapter.data.checked_files import FileProblem
from llama_adapter.host_training.host_config import HostRunConfig, TaskOptions
from llama_adapter.hosts.method_options import MethodOptions
from llama_adapter.quiet import quiet
from llama_adapter.seeded import seeded
from llama_adapter.tasks.base_to_novel import BaseToNovelTask, load_coop
from llama_adapter.tasks.conll import TaggingTask
from llama_adapter.tasks.host_tokenizer import FILES as TOKENIZER_FILES
from llama_adapter.tasks.host_tokenizer import import_transformers, load_tokenizer
from llama_adapter.tasks.image_pixels import VTAB, ImageCache, Preparation
from llama_adapter.tasks.squad import SquadTask
from llama_adapter.tasks.task import Task
from llama_adapter.tasks.vtab import VtabTask, load_vtab

# classes of transformers, by kind of host and of task
CLASSES = {
    ("vit", "image-classification"): "ViTForImageClassification",
    ("clip", "image-classification"): "CLIPForImageClassification",
    ("clip", "contrastive"): "CLIPModel",
    ("roberta", "question-answering"): "RobertaForQuestionAnswering",
    ("roberta", "token-classification"): "RobertaForTokenClassification",
    ("bert", "question-answering"): "BertForQuestionAnswering",
    ("bert", "token-classification"): "BertForTokenClassification",
}
# what a task may add to a host
_HEADS = ("classifier.", "qa_outputs.")


def _unreadable() -> tuple[type[BaseException], ...]:
    """What transformers raises, anywhere in it, of weights or a configuration that cannot be."""
    from huggingface_hub import errors

    # of a field of another type, in versions that check them
    of_fields = getattr(errors, "StrictDataclassError", ValueError)
    return (
        OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
        AssertionError, RuntimeError, SafetensorError, of_fields,
    )  # fmt: skip


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bar over the weights of a model that loads in a moment."""
    logging = import_transformers().utils.logging
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def _check_folder(folder: Path, host: str) -> None:
    """Raise unless a folder says that it is a host of this kind."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"model {folder} must be a folder with a config.json in it: "
            "names of a hub are not downloaded"
        )
    try:
        kind = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise ValueError(f"{file} does not tell a model_type ({error!r})") from None
    if kind != host:
        raise ValueError(f"model must be a {host}, got a {kind} in {folder}")


def load_task(
    options: TaskOptions,
    model: Path,
    *,
    seed: int = 0,
    labels: tuple[str, ...] | None = None,
) -> tuple[Task, list[FileProblem]]:
    """Read a task's files.

    Args:
        options: what is read, and how.
        model: folder of the host, whose tokenizer and preparation of images are taken.
        seed: of the choice of shots.
        labels: of a run that is evaluated, in the order of its head: training files are left alone
            where they are of text.

    Returns:
        The task, and what in its files cannot be used.

    Raises:
        FileNotFoundError: a file or folder is absent.
        ImportError: transformers or Pillow is missing.
        ValueError: a file holds nothing usable, or an option is out of range.
    """
    name, length = options.task, options.max_length
    lengths: Any = {} if length is None else {"max_length": length}
    if name == "vtab":
        kept: Any = {"preparation": Preparation.of_host(model, VTAB), "cache": ImageCache()}
        if options.dataset is not None:
            return load_vtab(options.data, options.dataset, **kept)
        return VtabTask.load(options.data, None if labels is None else len(labels), **kept)
    if name == "base_to_novel":
        own: Any = {
            "shots": options.shots, "seed": seed, "augment": options.augment,
            "cache": ImageCache(),
        }  # fmt: skip
        if options.dataset is not None:
            return load_coop(options.data, options.dataset, model, **own)
        assert options.images is not None
        template = options.template
        return BaseToNovelTask.load(options.data, options.images, model, template=template, **own)
    tokenizer = load_tokenizer(model, words=name != "squad")
    train = options.data if labels is None else None
    if name == "squad":
        test = options.test_data[0]
        return SquadTask.load(
            train, test, tokenizer, validation=options.val_data or test, stride=options.stride,
            **lengths,
        )  # fmt: skip
    return TaggingTask.load(
        train, options.test_data, tokenizer, data=name, validation=options.val_data, labels=labels,
        separator=options.separator, strict=options.strict_spans, **lengths,
    )  # fmt: skip


def final_task(task: Task) -> Task:
    """The task to train on with nothing held out."""
    assert isinstance(task, VtabTask)
    return task.final()


def method_options(config: HostRunConfig, task: Task) -> MethodOptions:
    """What a run's method is made with: CoOp's context takes the place of the task's own words."""
    options = config.method_options
    if isinstance(task, BaseToNovelTask) and options.template_length is None:
        options = replace(options, template_length=task.template_length)
    return options


def digest_of(options: TaskOptions, task: Task, model: Path) -> str:
    """A hash of what is trained on and chosen by, and of how a host reads it.

    Args:
        options: of the task.
        task: its sentences are taken, or its images with their labels, or its files.
        model: folder of the host.
    """
    digest = hashlib.sha256(reading_of(task, model).encode())
    if isinstance(task, VtabTask | BaseToNovelTask):
        more = task.everything if isinstance(task, VtabTask) else ()
        for item in (*task.train, *task.validation, *more):
            digest.update(f"{item.id} {item.label}\n".encode())
            digest.update(Path(item.path).read_bytes())
    elif isinstance(task, TaggingTask):
        # one data set may be several files
        for item in (*task.train, *task.validation):
            digest.update(repr((item.words, item.tags, item.predicate)).encode())
    else:
        for path in (options.data, options.val_data or options.test_data[0]):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def reading_of(task: Task, model: Path) -> str:
    """A hash of how a host is given a task: its preparation of images, and its tokenizer's files.

    Args:
        task: that was loaded for the host.
        model: folder of the host.
    """
    images = isinstance(task, VtabTask | BaseToNovelTask)
    digest = hashlib.sha256(repr(task.images.preparation).encode() if images else b"")
    for name in () if isinstance(task, VtabTask) else TOKENIZER_FILES:
        if (model / name).is_file():
            digest.update(f"{name}\n".encode() + (model / name).read_bytes())
    return digest.hexdigest()


def load_host(config: HostRunConfig, task: Task, labels: tuple[str, ...] | None = None) -> Any:
    """The host with a head for the task, in float32 and in eval mode; a new head is `seed`'s.

    Args:
        config: model, host, seed, dropout and device.
        task: whose kind and labels the head is for.
        labels: in place of the task's.

    Raises:
        FileNotFoundError: there is no such folder.
        ImportError: transformers is missing.
        ValueError: the folder holds a host of another kind, a configuration that cannot be or not
            all of the weights, or there is no such device.
    """
    _check_folder(config.model, config.host)
    with quiet():
        # found only now: transformers imports a model's module when it is asked for
        cls = getattr(import_transformers(), CLASSES[config.host, task.kind])
    names = task.labels if labels is None else labels
    more: dict[str, Any] = {}
    if task.kind in ("image-classification", "token-classification"):
        more["id2label"] = dict(enumerate(names))
        more["label2id"] = {label: place for place, label in enumerate(names)}
    if config.hidden_dropout is not None:
        more["hidden_dropout_prob"] = config.hidden_dropout
    device = checked_device(config.device or default_device())
    try:
        with seeded(config.fit.seed, torch.device("cpu")), quiet(), _without_bars():
            model, found = cls.from_pretrained(
                config.model, local_files_only=True, ignore_mismatched_sizes=True,
                output_loading_info=True, dtype=torch.float32, **more,
            )  # fmt: skip
    except _unreadable() as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"model {config.model} cannot be read: {said}") from error
    differing = [one[0] if isinstance(one, tuple) else one for one in found["mismatched_keys"]]
    lacking = sorted(
        name for name in (*found["missing_keys"], *differing) if not name.startswith(_HEADS)
    )
    if lacking:
        raise ValueError(
            f"model {config.model} must hold all weights of a {config.host}, it lacks {lacking[0]}"
        )
    ready: nn.Module = model.to(device).eval()
    return ready
