"""The command `evaluate`: one benchmark asked of a base and its adapter, scored, and resumable.

A run's folder holds run.json (what was asked of what), predictions.jsonl (item by item),
scores.json and the benchmark's own form of result; what cannot be used is in problems.txt.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from llama_adapter.answering import Answerer, ModelOptions
from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.checkpoints.fingerprint import fingerprint
from llama_adapter.completion import encode_prompt
from llama_adapter.data.checked_files import FileProblem
from llama_adapter.data.template import prompt_text
from llama_adapter.evaluation.benchmarks import (
    BENCHMARKS,
    Benchmark,
    question_of,
)
from llama_adapter.evaluation.choosing import likeliest
from llama_adapter.evaluation.data_options import DataOptions
from llama_adapter.evaluation.runner import SCORES_FILE, Evaluation, Item, evaluate
from llama_adapter.options import UsageError, add_options, build
from llama_adapter.sampling import SamplingConfig
from llama_adapter.vision import VisionOptions

PROBLEMS_FILE = "problems.txt"
_SHOWN = 3
# data options of every benchmark
_COMMON = ("data", "output", "blind")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `evaluate` takes."""
    parser.add_argument("benchmark", choices=tuple(BENCHMARKS), help="what is asked")
    parser.add_argument(
        "--batch-size", type=int, default=64, help="items answered together (default: 64)"
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse data with an entry that cannot be used"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    for cls in (DataOptions, ModelOptions, VisionOptions, SamplingConfig):
        add_options(parser, cls)
    own = "; ".join(
        f"{name}: temperature {one.sampling.temperature:g}, {one.sampling.max_new_tokens} tokens"
        for name, one in BENCHMARKS.items()
        if one.bind is None
    )
    parser.epilog = (
        f"Without sampling options a benchmark has its own. {own}. open_llm needs "
        "pip install 'lm-eval[hf]' and asks ARC with 25 examples, HellaSwag with 10, MMLU with 5 "
        "and TruthfulQA with none."
    )


def run(options: argparse.Namespace) -> int:
    """Evaluate what the options ask for, and print the scores.

    Raises:
        UsageError: they do not go together, or the data cannot be used.
        OSError, ValueError: as whatever loads, reads and answers.
    """
    # what is unpacked is in nobody's way should the output hold another run
    with tempfile.TemporaryDirectory(prefix="llama-adapter-images-") as unpacked:
        return _run(options, Path(unpacked))


def _run(options: argparse.Namespace, unpacked: Path) -> int:
    name, given = options.benchmark, vars(options)
    benchmark, data = BENCHMARKS[name], build(DataOptions, given)
    _check(name, benchmark, data, given, options.batch_size)
    sampling = build(SamplingConfig, {**asdict(benchmark.sampling), **given})
    model, vision = build(ModelOptions, given), build(VisionOptions, given)
    root = vision.images if benchmark.root is None else benchmark.root(data, unpacked)
    answerer = None
    if data.reviews is None:
        answerer = model.load(replace(vision, images=root), progress=not options.quiet)
    seeing = answerer is not None and answerer.sees and not data.blind
    if seeing and root is None and benchmark.images:
        raise UsageError(
            "--images is required, the folder that the images' paths start from: the adapter "
            "takes images (or --blind)"
        )
    # where nobody looks at the images they need not be there
    images = None if root is None or not seeing else root.absolute()
    if benchmark.bind is not None:
        benchmark = benchmark.bind(benchmark, data)
    items, problems = benchmark.load(data, images)
    items = [relative(item, images) for item in items]
    seeing = seeing and any(item.get("image") for item in items)
    if seeing and answerer is not None:
        items, unseen = _with_images(items, answerer, data)
        problems += unseen
    # a benchmark that predicts by itself asks for no answers
    asked = [item for item in items if "given" not in item] if benchmark.predict is None else []
    texts = {item["id"]: _text(benchmark, data, item) for item in asked}
    if answerer is not None:
        problems += _too_long(benchmark, data, texts, items, answerer)
    if options.strict and problems:
        raise UsageError(told(problems))
    try:
        evaluation = evaluate(
            items,
            benchmark.predict(answerer, options.batch_size)
            if benchmark.predict is not None and answerer is not None
            else _predictor(benchmark, data, items, texts, answerer, sampling, seeing),
            lambda item, prediction: benchmark.score(item, prediction, data),
            data.output,
            settings=_settings(name, data, model, answerer, sampling, seeing),
            batch_size=options.batch_size,
            batch_key=lambda item: len(texts.get(item["id"], "")),
            aggregate=benchmark.aggregate,
            corpus=benchmark.corpus,
            progress=None if options.quiet else name,
            opened=lambda: report(problems, data.output),
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped: the same command goes on from {data.output}") from None
    blind = benchmark.images and answerer is not None and not seeing
    title = f"{name}, {len(items)} items{', asked without their images' if blind else ''}"
    _finish(title, benchmark, data, items, evaluation, _called(model, data))
    return 0


def _check(
    name: str, benchmark: Benchmark, data: DataOptions, given: Mapping[str, Any], batch_size: int
) -> None:
    """Raise UsageError for options that do not go together."""
    if batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {batch_size}")
    for spec in fields(DataOptions):
        flag = f"--{spec.name.replace('_', '-')}"
        if spec.name in given and spec.name not in (*_COMMON, *benchmark.takes):
            raise UsageError(f"{flag} is no option of {name}")
        if spec.name in benchmark.needs and getattr(data, spec.name) is None:
            raise UsageError(f"{flag} is required for {name}")
    for spec in fields(SamplingConfig) if benchmark.bind is not None else ():
        if spec.name in given:
            raise UsageError(f"--{spec.name.replace('_', '-')} is no option of {name}")
    if benchmark.check is not None:
        try:
            benchmark.check(data)
        except ModuleNotFoundError as error:
            raise UsageError(str(error)) from error


def relative(item: Item, root: Path | None) -> Item:
    """An item that names its image from the root on: a run's folder and data may move."""
    image = item.get("image")
    if image is None or root is None:
        return item
    return {**item, "image": os.path.relpath(os.path.abspath(image), root)}


def _with_images(
    items: Sequence[Item], answerer: Answerer, data: DataOptions
) -> tuple[list[Item], list[FileProblem]]:
    """The items whose image can be seen, or that have none; and why the others cannot be used."""
    named = [item["image"] for item in items if item.get("image")]
    bad = answerer.pictures.unusable(named) if named else {}
    kept: list[Item] = []
    problems = []
    for position, item in enumerate(items):
        reason = bad.get(item.get("image") or "")
        if reason is None:
            kept.append(item)
        else:
            reason = f"{reason}, of item {item['id']!r}"
            problems.append(FileProblem(position, reason, str(data.data), "item"))
    if not kept:
        raise UsageError(f"{data.data}: none of the images can be used: {problems[0]}")
    return kept, problems


def _text(benchmark: Benchmark, data: DataOptions, item: Item) -> str:
    question = question_of(benchmark, item, data)
    return prompt_text(question) if benchmark.wrapped else question


def _outputs(benchmark: Benchmark, data: DataOptions, item: Item) -> Mapping[str, str]:
    """What is chosen from, by the prediction that it stands for; nothing where it is generated."""
    return {} if benchmark.options is None or not data.choose else benchmark.options(item)


def _too_long(
    benchmark: Benchmark,
    data: DataOptions,
    texts: dict[str, str],
    items: Sequence[Item],
    answerer: Answerer,
) -> list[FileProblem]:
    """Take out the texts that leave no room for an answer, which is empty then, and say so."""
    context = answerer.base.model.config.max_seq_len
    problems = []
    for position, item in enumerate(items):
        name = item["id"]
        if name not in texts:
            continue
        # a longer option may have fewer tokens
        outputs = _outputs(benchmark, data, item).values() or ("",)
        count = max(
            len(encode_prompt(texts[name] + output, answerer.base.tokenizer, f"item {name!r}"))
            for output in outputs
        )
        if count >= context:
            del texts[name]
            reason = (
                f"item {name!r}: its prompt must have at most {context - 1} tokens, got {count}: "
                "its answer is empty"
            )
            problems.append(FileProblem(position, reason, str(data.data), "item"))
    return problems


def told(problems: Sequence[FileProblem]) -> str:
    """The first few entries that cannot be used."""
    shown = "; ".join(map(str, problems[:_SHOWN]))
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return f"{len(problems)} entries cannot be used: {shown}{more}"


def report(problems: Sequence[FileProblem], folder: Path) -> None:
    """List what cannot be used in a run's folder, and the first few on stderr."""
    if problems:
        listed = folder / PROBLEMS_FILE
        write_atomically(listed, "".join(f"{problem}\n" for problem in problems).encode())
        said = told(problems).replace(" used: ", f" used, listed in {listed}: ", 1)
        print(f"warning: {said}", file=sys.stderr)


def print_scores(title: str, scores: Mapping[str, float], folder: Path) -> None:
    """What a run has found, and where it is."""
    print(title)
    width = max(map(len, scores), default=0)
    for key, value in scores.items():
        print(f"  {key:{width}}  {value:.4f}".rstrip("0").rstrip("."))
    if not scores:
        print("  no scores: the data has no answers")
    print(f"scores      {folder / SCORES_FILE}")


def _predictor(
    benchmark: Benchmark,
    data: DataOptions,
    items: Sequence[Item],
    texts: Mapping[str, str],
    answerer: Answerer | None,
    sampling: SamplingConfig,
    seeing: bool,
) -> Callable[[list[Item]], list[str]]:
    """Answers to a batch of items, each as it would be alone."""
    places = {item["id"]: place for place, item in enumerate(items)}

    def predict(batch: list[Item]) -> list[str]:
        asked = [item for item in batch if item["id"] in texts]
        found = {item["id"]: item.get("given", "") for item in batch}
        if asked and answerer is not None:
            prompts = [texts[item["id"]] for item in asked]
            images = [item.get("image") if seeing else None for item in asked]
            options = [_outputs(benchmark, data, item) for item in asked]
            if all(options):
                answers = likeliest(answerer, prompts, options, images)
            else:
                seeds = [places[item["id"]] for item in asked]
                answers = answerer.answers(prompts, sampling, images=images, row_seeds=seeds)
            found |= {item["id"]: text.strip() for item, text in zip(asked, answers, strict=True)}
        return [found[item["id"]] for item in batch]

    return predict


def _settings(
    name: str,
    data: DataOptions,
    model: ModelOptions,
    answerer: Answerer | None,
    sampling: SamplingConfig,
    seeing: bool,
) -> dict[str, Any]:
    """Whatever predictions depend on besides the items, by the names of the options."""
    if answerer is None:
        return {"benchmark": name, "reviews": _digest(data.reviews)}
    base = answerer.base
    whole = asdict(base.fingerprint or fingerprint(base.model, base.name))
    weights = {key: whole[key] for key in ("shape", "samples")}
    digest = hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:16]
    return {
        "benchmark": name,
        "base": f"{base.name} {digest}",
        "adapter": _digest(model.adapter),
        "dtype": str(base.model.output_weight.dtype).removeprefix("torch."),
        "quantize": model.quantize,
        "vision_model": answerer.pictures.encoder.digest if seeing else None,
        "images": answerer.pictures.content if seeing else None,
        "suffix": data.suffix,
        "choose": data.choose,
        **asdict(sampling),
    }


def _digest(path: Path | None) -> str | None:
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _called(model: ModelOptions, data: DataOptions) -> str:
    """What a run's model is called in results that name it: no other adapter is called the same.

    Every run's file is adapter.safetensors, so that its folder's name says more; a digest of the
    content tells the rest apart.
    """
    if data.reviews is not None:
        return data.reviews.stem
    if model.adapter is None:
        return model.base.name
    path = model.adapter.absolute()
    name = path.parent.name if path.stem == "adapter" else path.stem
    return f"{model.base.name}+{name}-{_digest(path)}"


def _finish(
    title: str,
    benchmark: Benchmark,
    data: DataOptions,
    items: Sequence[Item],
    evaluation: Evaluation,
    called: str,
) -> None:
    """Write the result in the benchmark's own form and print the scores."""
    print_scores(title, evaluation.scores, data.output)
    if benchmark.write is not None:
        path = data.output / benchmark.result
        benchmark.write(path, items, evaluation.predictions, data, called)
        print(f"result      {path}")
