"""The command `records`: a benchmark's own files as records that `finetune --data` takes.

A record asks what `evaluate` asks, word for word, and answers what the data says: a question of
ScienceQA its option, an image of COCO each of its captions, one of VQAv2 and its kin the answer
that most people gave.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.evaluation.benchmarks import (
    BENCHMARKS,
    Benchmark,
    question_of,
)
from llama_adapter.evaluation.command import relative
from llama_adapter.evaluation.data_options import DataOptions, SourceOptions
from llama_adapter.evaluation.runner import Item
from llama_adapter.options import UsageError, add_options, build

NAMES = tuple(name for name, one in BENCHMARKS.items() if one.targets is not None)
_SHOWN = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `records` takes."""
    parser.add_argument("benchmark", choices=NAMES, help="whose files they are")
    parser.add_argument("--output", type=Path, required=True, help=".jsonl file to create")
    parser.add_argument(
        "--images",
        type=Path,
        help="folder that the paths of images are to start from; default: records without images",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_options(parser, SourceOptions)


def run(options: argparse.Namespace) -> int:
    """Write the records that the options ask for, and say how many.

    Raises:
        UsageError: they do not go together, or nobody has answered the questions.
        OSError, ValueError: as whatever reads.
    """
    name, given = options.benchmark, vars(options)
    benchmark, source = BENCHMARKS[name], build(SourceOptions, given)
    for spec in ("split", "annotations", "image_name", "suffix"):
        if spec in given and spec not in benchmark.takes:
            raise UsageError(f"--{spec.replace('_', '-')} is no option of {name}")
    if options.output.suffix != ".jsonl":
        raise UsageError(f"--output must be a .jsonl file, got {options.output}")
    if source.split is None:
        source = replace(source, split=benchmark.training_split(source))
    images = None if options.images is None else options.images.absolute()
    items, problems = benchmark.load(DataOptions(**asdict(source), output=options.output), images)
    items = [relative(x, images) if images else {**x, "image": None} for x in items]
    bar = tqdm(items, name, unit=" items", delay=1, disable=options.quiet or None)
    found = [json.dumps(row, ensure_ascii=False) for row in records(benchmark, source, bar)]
    if not found:
        raise UsageError(f"{source.data} must have answers to train on, got none")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, "".join(f"{line}\n" for line in found).encode())
    assert benchmark.targets is not None
    empty = sum(not target.strip() for item in items for target in benchmark.targets(item))
    if empty:
        print(f"warning: {empty} empty answers are left out", file=sys.stderr)
    for problem in problems[:_SHOWN]:
        print(f"warning: {problem}", file=sys.stderr)
    if len(problems) > _SHOWN:
        print(f"warning: {len(problems) - _SHOWN} entries more cannot be used", file=sys.stderr)
    print(f"{name}, {len(found)} records of {len(items)} items, in {options.output}")
    return 0


def records(
    benchmark: Benchmark, source: SourceOptions, items: Iterable[Item]
) -> Iterator[dict[str, str]]:
    """What `finetune` takes of items: a record for each of their answers that is not empty.

    Args:
        benchmark: with targets.
        source: of the items.
        items: of its loader; images are as the records are to name them.
    """
    assert benchmark.targets is not None
    for item in items:
        question, image = question_of(benchmark, item, source), item.get("image")
        for target in filter(str.strip, benchmark.targets(item)):
            row = {"prompt": question, "completion": target}
            if benchmark.wrapped:
                row = {"instruction": question, "output": target}
            yield row if image is None else {**row, "image": image}
