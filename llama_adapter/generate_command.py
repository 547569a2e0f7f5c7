"""The command `generate`: one instruction answered as it is written, or a file of them.

An image is a file beside the instruction, or named by a record. What experts said of it goes to
stderr, or into the record's line.
"""

import argparse
import bisect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama_adapter.answering import Answerer, ExpertOptions, Image, ModelOptions
from llama_adapter.completion import encode_prompt
from llama_adapter.data.items import read_items
from llama_adapter.data.template import prompt_text
from llama_adapter.multimodal.experts import Context, Expert, context_of, shortened
from llama_adapter.multimodal.pictures import located
from llama_adapter.options import UsageError, add_options, build
from llama_adapter.sampling import SamplingConfig
from llama_adapter.vision import VisionOptions

# records with images whose prompts are projected together: 310 MB for 7B
_TOGETHER = 64


@dataclass(frozen=True)
class _Question:
    """One thing to answer.

    Attributes:
        text: the full prompt.
        image: that the adapter sees; None for one without, or that experts alone see.
        context: what experts said of it.
    """

    text: str
    image: Image | None
    context: Context


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `generate` takes."""
    parser.add_argument("instruction", nargs="?", help="the instruction")
    parser.add_argument("--input", default="", help="text that the instruction is about")
    parser.add_argument("--image", type=Path, help="image that the instruction is about")
    parser.add_argument(
        "--data", type=Path, help="file of instructions, JSON or .jsonl; prints JSON lines"
    )
    parser.add_argument(
        "--batch-size", type=int, help="instructions of --data answered together (default: 8)"
    )
    for cls in (ModelOptions, SamplingConfig, VisionOptions, ExpertOptions):
        add_options(parser, cls)


def generate(options: argparse.Namespace) -> int:
    """Answer what the options ask, on stdout.

    Raises:
        UsageError: they do not go together, or a record cannot be answered.
        OSError, ValueError: as whatever loads, reads and answers.
    """
    _check(options)
    sampling = build(SamplingConfig, vars(options))
    vision, told = build(VisionOptions, vars(options)), build(ExpertOptions, vars(options))
    items = None if options.data is None else _read_questions(options.data)
    if items is None:
        # the one image is a file as it is named, wherever the records' images lie
        vision = replace(vision, images=None)
    answerer = build(ModelOptions, vars(options)).load(vision)
    experts = told.experts(answerer)
    if items is not None:
        _answer_file(options, answerer, items, experts, sampling)
        return 0
    words = (options.instruction, options.input)
    asked = _question(answerer, *words, options.image, experts, sampling)
    for name, text in asked.context.said.items():
        print(f"{name} said: {text}", file=sys.stderr)
    tell(answerer, asked.text, sampling, asked.image)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise UsageError for options that do not go together."""
    if (options.instruction is None) == (options.data is None):
        raise UsageError("give either an instruction or --data")
    if options.batch_size is not None and options.data is None:
        raise UsageError("--batch-size goes with --data")
    if options.batch_size is not None and options.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {options.batch_size}")
    for name in ("input", "image"):
        if options.data is not None and getattr(options, name):
            raise UsageError(
                f"--{name} goes with an instruction; the records of --data have their own"
            )
    if options.data is None and options.image is None and getattr(options, "expert", ()):
        raise UsageError("--expert goes with --image, or with images of --data")


def _question(
    answerer: Answerer,
    instruction: str,
    input: str,
    image: Image | None,
    experts: Mapping[str, Expert],
    sampling: SamplingConfig,
) -> _Question:
    """An instruction with what experts say of its image, below its own input.

    Each expert's words are cut to as many characters as leave the answer its tokens, or half of the
    context where it may have more; none are left where the instruction alone takes all of the rest.
    """

    def text_with(context: Context) -> str:
        return prompt_text(instruction, "\n".join(text for text in (input, context.text) if text))

    context = Context({}, "")
    if image is not None and experts:
        context = context_of(located(image, answerer.vision.images), experts)
    if context.said:
        whole = answerer.base.model.config.max_seq_len
        most = whole - min(sampling.max_new_tokens, whole // 2)

        def too_long(kept: int) -> bool:
            text = text_with(shortened(context, kept))
            return len(encode_prompt(text, answerer.base.tokenizer, "the prompt")) > most

        longest = max(map(len, context.said.values()))
        kept = bisect.bisect_left(range(longest + 1), True, key=too_long) - 1
        context = shortened(context, max(kept, 0))
    # without a projector the image is for the experts
    seen = image if answerer.sees or not experts else None
    return _Question(text_with(context), seen, context)


def tell(
    answerer: Answerer, text: str, sampling: SamplingConfig, image: Image | None = None
) -> str:
    """Print one completion without its leading blanks, piece by piece, and return it.

    Raises:
        ValueError: the text is too long; or as the answerer.
    """
    answer = ""
    try:
        pieces = answerer.stream([text], sampling, images=[image])
    except ValueError as error:
        raise ValueError(str(error).replace("texts[0]", "the instruction's prompt")) from error
    for piece in pieces:
        shown = piece.text if answer else piece.text.lstrip()
        answer += shown
        print(shown, end="", flush=True)
    print()
    return answer


def _read_questions(path: Path) -> list[dict[str, Any]]:
    """Objects with an instruction, perhaps an input and an image, of a JSON list or `.jsonl`."""
    try:
        items = read_items(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--data {error}") from error
    for index, item in enumerate(items):
        where = f"--data {path}: record {index}, counted from 0"
        if not isinstance(item, dict) or not isinstance(item.get("instruction"), str):
            raise UsageError(f"{where}, has no instruction")
        if not isinstance(item.get("input", ""), str):
            raise UsageError(f"{where}: input must be a string")
        if not isinstance(item.get("image", ""), str | None):
            raise UsageError(f"{where}: image must be a path")
    return items


def _answer_file(
    options: argparse.Namespace,
    answerer: Answerer,
    items: Sequence[dict[str, Any]],
    experts: Mapping[str, Expert],
    sampling: SamplingConfig,
) -> None:
    """Print a JSON line for every record, which is answered as it would be alone."""
    seen = any(item.get("image") for item in items)
    together = _TOGETHER if seen else max(len(items), 1)
    for start in range(0, len(items), together):
        _answer_some(options, answerer, items[start : start + together], start, experts, sampling)


def _answer_some(
    options: argparse.Namespace,
    answerer: Answerer,
    items: Sequence[dict[str, Any]],
    start: int,
    experts: Mapping[str, Expert],
    sampling: SamplingConfig,
) -> None:
    asked: list[_Question] = []
    for index, item in enumerate(items, start):
        image = item.get("image") or None
        try:
            words = (item["instruction"], item.get("input", ""))
            asked.append(_question(answerer, *words, image, experts, sampling))
            if asked[-1].image is not None:
                _ = answerer.pictures
        except (FileNotFoundError, ValueError) as error:
            raise _against(options, index, error) from error
    seen = [one.image for one in asked]
    given = [image for image in seen if image is not None]
    bad = answerer.pictures.unusable(given) if given else {}
    for index, image in enumerate(seen, start):
        if str(image) in bad:
            raise _against(options, index, bad[str(image)])
    try:
        pieces = answerer.stream(
            [one.text for one in asked],
            sampling,
            images=seen,
            row_seeds=[0] * len(asked),
            max_batch=8 if options.batch_size is None else options.batch_size,
        )
        answers: dict[int, str] = {}
        printed = 0
        for piece in pieces:
            if piece.completion is not None:
                answers[piece.row] = piece.completion.text.lstrip()
            while printed in answers:
                print(_line(items[printed], asked[printed], answers.pop(printed)), flush=True)
                printed += 1
    except ValueError as error:
        told = re.sub(
            r"texts\[(\d+)\]",
            lambda found: (
                f"record {start + int(found[1])}, counted from 0: the instruction's prompt"
            ),
            str(error),
        )
        raise UsageError(f"--data {options.data}: {told}") from error


def _against(options: argparse.Namespace, index: int, reason: object) -> UsageError:
    return UsageError(f"--data {options.data}: record {index}, counted from 0: {reason}")


def _line(item: Mapping[str, Any], asked: _Question, answer: str) -> str:
    line = {"instruction": item["instruction"], "input": item.get("input", "")}
    if item.get("image"):
        line["image"] = item["image"]
    if asked.context.said:
        line["experts"] = dict(asked.context.said)
    return json.dumps({**line, "output": answer}, ensure_ascii=False)
