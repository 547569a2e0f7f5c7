"""`evaluate vtab|squad|conll03|... --run RUN`: what runs of `finetune --host` have learnt.

An evaluation's folder holds run.json (what was asked of what), predictions.jsonl (item by item),
scores.json and the task's own form of result; what cannot be used is in problems.txt.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llama_adapter.data.checked_files import write_json
from llama_adapter.evaluation.command import print_scores, report, told
from llama_adapter.evaluation.host_items import (
    ACCURACIES_FILE,
    item_scores,
    items_of,
    means,
    over_seeds,
    write_result,
)
from llama_adapter.evaluation.runner import Item, Scores, evaluate
from llama_adapter.host_training.host_config import MOST_THREADS, TASKS, TEXT_TASKS, HostRunConfig
from llama_adapter.host_training.loading import load_host, load_task, method_options, reading_of
from llama_adapter.host_training.method_file import host_fingerprint, load_trained, result_names
from llama_adapter.host_training.run import TASK_FILE
from llama_adapter.hosts.methods import attach
from llama_adapter.options import UsageError, add_options, build, read_config, read_object
from llama_adapter.seeded import seeded

SPLITS = ("test", "validation")


@dataclass(frozen=True)
class HostEvaluation:
    """Runs of finetune --host."""

    run: tuple[Path, ...] = field(
        metadata={"help": "run folder, or several of one task, whose means are told too"}
    )
    output: Path | None = field(
        default=None,
        metadata={"help": "folder to create, or to go on with; default: evaluate-SPLIT in the run"},
    )
    data: Path | None = field(
        default=None,
        metadata={"help": "file or folder in place of the one that the run was trained with"},
    )
    model: Path | None = field(
        default=None, metadata={"help": "folder of the host, if it has moved since the run"}
    )
    split: str = field(default="test", metadata={"help": "which part of it", "choices": SPLITS})
    device: str | None = field(
        default=None, metadata={"help": "where to compute; default: the run's"}
    )
    threads: int | None = field(
        default=None, metadata={"help": "CPU threads; default: torch's choice"}
    )

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("--run must name a run folder")
        if len(self.run) > 1 and self.data is not None:
            raise ValueError(f"--data must be left out with {len(self.run)} runs")
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"--threads must be from 1 to {MOST_THREADS}, got {self.threads}")


def is_wanted(arguments: list[str]) -> bool:
    """Whether words of `evaluate` are about a run of a host."""
    asked = arguments[:1] and arguments[0] in TASKS
    return bool(asked) or any(word.split("=")[0] == "--run" for word in arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `evaluate` takes of a host's task."""
    parser.description = "Evaluate runs of finetune --host."
    parser.add_argument("benchmark", choices=tuple(TASKS), help="the task that they were made for")
    parser.add_argument(
        "--batch-size", type=int, default=64, help="items answered together (default: 64)"
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse data with an entry that cannot be used"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_options(parser, HostEvaluation)


def run(options: argparse.Namespace) -> int:
    """Evaluate the runs that the options name, and print their scores.

    Raises:
        UsageError: options do not go together, or a run is of another task or not at its end.
        OSError, ValueError: as whatever loads, reads and predicts.
    """
    if options.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {options.batch_size}")
    given = build(HostEvaluation, vars(options))
    several = len(given.run) > 1
    configs = {path: _config(path, options.benchmark) for path in given.run}
    found: dict[str, list[Scores]] = {}
    for path, config in configs.items():
        name = config.task_options.dataset or path.resolve().name
        inside = path / f"evaluate-{given.split}"
        folder = inside if several or given.output is None else given.output
        try:
            found.setdefault(name, []).append(_evaluate(path, config, given, folder, options))
        except ImportError as error:
            raise UsageError(str(error)) from error
        except KeyboardInterrupt:
            message = f"stopped: the same command goes on from {folder}"
            raise KeyboardInterrupt(message) from None
    if several:
        _tell_means(options.benchmark, found, given.output)
    return 0


def _config(folder: Path, task: str) -> HostRunConfig:
    """What a run was made with."""
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"--run {folder} holds no run (config.json is missing)")
    if "host" not in read_object(path, "--run"):
        raise UsageError(f"--run {folder} is no run of finetune --host")
    config = build(HostRunConfig, read_config(path, HostRunConfig, "--run"))
    if config.task_options.task != task:
        raise UsageError(f"--run {folder} is of {config.task_options.task}, not of {task}")
    return config


def _labels(folder: Path) -> tuple[str, ...]:
    """Names of the head's outputs, as the run has written them."""
    path = folder / TASK_FILE
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))["labels"]
        if not isinstance(labels, list) or not all(isinstance(one, str) for one in labels):
            raise ValueError(f"labels must be a list of texts, got {str(labels)[:40]}")
        return tuple(labels)
    except FileNotFoundError:
        raise UsageError(f"--run {folder} has not begun ({TASK_FILE} is missing)") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{path} names no labels ({error!r})") from None


def _evaluate(
    path: Path,
    config: HostRunConfig,
    given: HostEvaluation,
    folder: Path,
    options: argparse.Namespace,
) -> Scores:
    """Scores of one run, which are printed and kept."""
    task_options, labels = config.task_options, _labels(path)
    if given.data is not None:
        if task_options.task in TEXT_TASKS:
            # the file is the only one that is asked, whatever the split is called
            replaced: dict[str, Any] = {"test_data": (given.data,), "val_data": given.data}
        else:
            replaced = {"data": given.data}
        task_options = replace(task_options, **replaced)
    config = replace(
        config,
        model=given.model or config.model,
        device=given.device or config.device,
        task_options=task_options,
    )
    task, problems = load_task(task_options, config.model, seed=config.fit.seed, labels=labels)
    if options.strict and problems:
        raise UsageError(told(problems))
    listed: Sequence[Any] = getattr(task, given.split)
    if not listed:
        raise UsageError(f"--split {given.split}: the run has no such data (--val-data)")
    model = load_host(config, task, labels)
    host = host_fingerprint(model)
    made_with = method_options(config, task)
    generator = torch.Generator().manual_seed(config.fit.seed)
    attached = attach(model, config.method, made_with, generator=generator)
    load_trained(path, attached, host)
    items = items_of(listed)
    by_id = {item["id"]: one for item, one in zip(items, listed, strict=True)}

    def predict(batch: list[Item]) -> list[Any]:
        return task.predict(model, [by_id[item["id"]] for item in batch])

    written = result_names(config.method, config.method_options)
    weights = b"".join((path / name).read_bytes() for name in written)
    settings = {
        "benchmark": task_options.task,
        "dataset": task_options.dataset,
        "split": given.split,
        "host": f"{config.host} {_digest(json.dumps([host.shape, host.samples]).encode())}",
        "method": config.method,
        "weights": _digest(weights),
        "reading": reading_of(task, config.model)[:16],
        **_reading(task_options.task, config),
    }
    with seeded(config.fit.seed, torch.device("cpu"), given.threads):
        evaluation = evaluate(
            items,
            predict,
            lambda item, prediction: item_scores(task, by_id[item["id"]], prediction),
            folder,
            settings=settings,
            batch_size=options.batch_size,
            corpus=lambda _, predictions: task.score(listed, predictions),
            progress=None if options.quiet else task_options.dataset or task_options.task,
            opened=lambda: report(problems, folder),
        )
    result = write_result(folder, listed, evaluation.predictions, evaluation.scores)
    of = f" {task_options.dataset}" if task_options.dataset else ""
    title = f"{task_options.task}{of} {given.split}, {len(items)} items, {config.method} in {path}"
    print_scores(title, evaluation.scores, folder)
    print(f"result      {result}")
    return evaluation.scores


def _reading(task: str, config: HostRunConfig) -> dict[str, Any]:
    """How a task's items are given to a host, where options decide it."""
    names = {
        "squad": ("max_length", "stride"),
        "base_to_novel": ("template",),
        **dict.fromkeys(TEXT_TASKS[1:], ("max_length", "separator", "strict_spans")),
    }
    return {name: getattr(config.task_options, name) for name in names.get(task, ())}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _tell_means(task: str, found: Mapping[str, list[Scores]], output: Path | None) -> None:
    """Print what a table of the papers has below its rows, and keep it where there is a folder.

    Runs on one data set, of several seeds, are averaged first.
    """
    scores = {name: over_seeds(task, rows) for name, rows in found.items()}
    below = means(task, scores)
    print(f"{task}, {sum(map(len, found.values()))} runs")
    width = max(map(len, [*scores, *below]))
    for name, row in scores.items():
        print(f"  {name:{width}}  " + "  ".join(f"{key} {value:.2f}" for key, value in row.items()))
    for name, value in below.items():
        said = name if name.startswith("mean") else f"mean {name}"
        print(f"  {said:{width}}  {value:.2f}")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / ACCURACIES_FILE, {"scores": scores, "means": below})
        print(f"result      {output / ACCURACIES_FILE}")
