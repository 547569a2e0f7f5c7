"""Every option of `finetune --host`: the host, the task and its files, the method, the training."""

from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from llama_adapter.host_training.fit_config import FitConfig
from llama_adapter.hosts.methods import METHODS, MethodOptions
from llama_adapter.tasks.base_to_novel import COOP_DATA
from llama_adapter.tasks.few_shot import SHOTS, TEMPLATE
from llama_adapter.tasks.vtab import VTAB_TASKS

HOSTS = ("vit", "roberta", "bert", "clip")
_TEXT = ("roberta", "bert")
TAGGING = ("conll03", "conll04", "conll05", "conll12")
TEXT_TASKS = ("squad", *TAGGING)
# the kinds of host that a task is for
TASKS: dict[str, tuple[str, ...]] = {
    "vtab": ("vit", "clip"),
    **dict.fromkeys(TEXT_TASKS, _TEXT),
    "base_to_novel": ("clip",),
}
# the score that chooses, known before a file of the task is read
METRICS = {"vtab": "accuracy", **dict.fromkeys(TEXT_TASKS, "f1"), "base_to_novel": "base"}
FINAL = ("train", "train+val")
MOST_THREADS = 1024


def _about(help: str, *tasks: str, choices: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Metadata of an option; of no task named it is one of all."""
    return {"help": help, "choices": choices, "tasks": tasks}


@dataclass(frozen=True)
class TaskOptions:
    """Task."""

    task: str = field(metadata=_about("what is learnt", choices=tuple(TASKS)))
    data: Path = field(
        metadata=_about(
            "training file of squad and conll, in the data set's own form; of vtab the folder of "
            "train800.txt, val200.txt, train800val200.txt and test.txt with lines 'image label', "
            "or with --dataset that of all tasks; of base_to_novel a split_zhou JSON file, or "
            "with --dataset the folder of all data sets"
        )
    )
    dataset: str | None = field(
        default=None,
        metadata=_about("one of VTAB-1k's tasks, or of CoOp's data sets", "vtab", "base_to_novel"),
    )
    images: Path | None = field(
        default=None,
        metadata=_about("folder that the images of a split file start from", "base_to_novel"),
    )
    val_data: Path | None = field(
        default=None,
        metadata=_about(
            "file to choose epochs and learning rates by; default: of squad its test file, which "
            "is then reported too, as P-tuning v2 does; of conll none, which keeps the last epoch",
            *TEXT_TASKS,
        ),
    )
    test_data: tuple[Path, ...] = field(
        default=(), metadata=_about("file, or files, that the tables report", *TEXT_TASKS)
    )
    max_length: int | None = field(
        default=None,
        metadata=_about(
            "tokens of a window or a sentence; default: 384 of squad, 128 of conll", *TEXT_TASKS
        ),
    )
    stride: int = field(
        default=128, metadata=_about("tokens that neighbouring windows share", "squad")
    )
    separator: str | None = field(
        default=None,
        metadata=_about(
            "word before a sentence's predicate; default: the tokenizer's separating token",
            "conll05",
            "conll12",
        ),
    )
    strict_spans: bool = field(
        default=False,
        metadata=_about("read spans as IOB2 is defined, not as conlleval does", *TAGGING),
    )
    template: str = field(
        default=TEMPLATE, metadata=_about("text of a class, of a split file", "base_to_novel")
    )
    shots: int = field(
        default=SHOTS, metadata=_about("images of a class to train on", "base_to_novel")
    )
    augment: bool = field(
        default=True,
        metadata=_about("train on random pieces of images, mirrored at random", "base_to_novel"),
    )

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}, got {self.task!r}")
        for spec in fields(self):
            tasks, given = spec.metadata.get("tasks", ()), getattr(self, spec.name)
            if tasks and self.task not in tasks and given != spec.default:
                raise ValueError(f"{spec.name} is no option of {self.task}, got {given}")
        known = {"vtab": VTAB_TASKS, "base_to_novel": COOP_DATA}.get(self.task, {})
        if self.dataset is not None and self.dataset not in known:
            raise ValueError(f"dataset must be one of {', '.join(known)}, got {self.dataset!r}")
        if self.task in TEXT_TASKS and not self.test_data:
            raise ValueError(f"test_data is required for {self.task}")
        if self.task == "squad" and len(self.test_data) > 1:
            raise ValueError(f"test_data must be one file for squad, got {len(self.test_data)}")
        if self.task == "base_to_novel" and (self.dataset is None) == (self.images is None):
            raise ValueError(
                "dataset or images must be given for base_to_novel: data is then the folder of all "
                "data sets, or a split file"
            )
        if self.dataset is not None and self.template != TEMPLATE:
            raise ValueError(f"template must be left out where dataset is given: {self.dataset}'s")


@dataclass(frozen=True)
class HostRunConfig:
    """Fine-tuning a ViT, RoBERTa, BERT or CLIP."""

    host: str = field(metadata=_about("kind of the model", choices=HOSTS))
    model: Path = field(metadata=_about("folder of the model, as transformers saves it"))
    output: Path = field(metadata=_about("run folder to create"))
    task_options: TaskOptions
    method: str = field(
        default="zero_init", metadata=_about("what is trained", choices=tuple(METHODS))
    )
    lr_grid: tuple[float, ...] = field(
        default=(),
        metadata=_about(
            "learning rates to choose from by validation, the smallest of equals; replaces --lr"
        ),
    )
    final: str = field(
        default="train",
        metadata=_about(
            "what the weights are trained on in the end: train keeps those of the chosen learning "
            "rate, train+val trains anew with nothing held out, of vtab alone",
            choices=FINAL,
        ),
    )
    hidden_dropout: float | None = field(
        default=None,
        metadata=_about("dropout of the host's hidden states and head; default: the host's own"),
    )
    strict: bool = field(
        default=False, metadata=_about("refuse data with an entry that cannot be used")
    )
    device: str | None = field(
        default=None, metadata=_about("where to compute; default: the GPU, if there is one")
    )
    threads: int | None = field(
        default=None, metadata=_about("CPU threads; default: torch's choice")
    )
    save_every: int = field(
        default=100, metadata=_about("optimiser steps between checkpoints; each fit's end has one")
    )
    keep_checkpoints: int = field(default=2, metadata=_about("checkpoints kept"))
    fit: FitConfig = field(default_factory=FitConfig)
    method_options: MethodOptions = field(default_factory=MethodOptions)

    def __post_init__(self) -> None:
        task = self.task_options.task
        for name, values in (("host", HOSTS), ("method", tuple(METHODS)), ("final", FINAL)):
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}"
                )
        if self.host not in TASKS[task]:
            raise ValueError(f"host must be {' or '.join(TASKS[task])} for {task}, got {self.host}")
        if self.host not in METHODS[self.method].hosts:
            hosts = ", ".join(METHODS[self.method].hosts)
            raise ValueError(f"method {self.method} is for {hosts}, got the host {self.host}")
        if self.final == "train+val" and task != "vtab":
            raise ValueError(
                f"final must be train for {task}, got train+val: it is vtab's protocol"
            )
        for rate in self.lr_grid:
            if not 0 < rate < float("inf"):
                raise ValueError(f"lr_grid must hold positive learning rates, got {rate}")
        if self.hidden_dropout is not None:
            if self.host == "clip":
                raise ValueError("hidden_dropout must be left out: a clip has none")
            if not 0 <= self.hidden_dropout < 1:
                raise ValueError(
                    f"hidden_dropout must be from 0 to below 1, got {self.hidden_dropout}"
                )
        for name in ("save_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"threads must be from 1 to {MOST_THREADS}, got {self.threads}")

    def absolute(self) -> "HostRunConfig":
        """The same from any working directory, but for the run folder."""
        task = self.task_options
        whole = {
            name: path and path.absolute()
            for name, path in (("images", task.images), ("val_data", task.val_data))
        }
        tested = tuple(path.absolute() for path in task.test_data)
        task = replace(task, data=task.data.absolute(), test_data=tested, **whole)
        return replace(self, model=self.model.absolute(), task_options=task)


def defaults(cls: type) -> dict[str, Any]:
    """The defaults of a dataclass's options, nested ones as mappings, those without left out."""
    found: dict[str, Any] = {}
    for spec in fields(cls):
        if spec.default is not MISSING:
            found[spec.name] = spec.default
        elif spec.default_factory is not MISSING:
            found[spec.name] = defaults(type(spec.default_factory()))
    return found
