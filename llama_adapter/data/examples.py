"""From records to examples: token ids, and labels on the response only.

A position without a label holds IGNORE_INDEX, which is no token id, so that no word of the
vocabulary can be mistaken for one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_adapter.data.records import (
    Problem,
    Record,
    load_records,
    remove_held_out,
    split_records,
    summarise,
)
from llama_adapter.data.template import prompt_text
from llama_adapter.tokenizer import Tokenizer

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Example:
    """One tokenised record.

    Attributes:
        index: the record's position in its file, for error messages.
        tokens: BOS, prompt, output, EOS as ids, cut at max_length.
        labels: the same ids, IGNORE_INDEX on BOS and prompt; as long as `tokens`.
    """

    index: int
    tokens: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def n_labels(self) -> int:
        """Tokens that carry loss."""
        return sum(label != IGNORE_INDEX for label in self.labels)


@dataclass(frozen=True)
class Batch:
    """The examples of one optimiser step, and the parameter groups that they train.

    Attributes:
        examples: at least one; split into micro-batches by the training loop.
        train_groups: names from `Adapter.groups`; all others are left alone by this step.
    """

    examples: tuple[Example, ...]
    train_groups: tuple[str, ...]


def encode_record(record: Record, tokenizer: Tokenizer, max_length: int) -> Example:
    """Tokenise one record, with labels on its output and EOS only.

    Prompt and prompt + output are tokenised each as a whole, as in the papers' recipe: the labels
    start behind as many tokens as the prompt alone has. Both are cut at max_length from the right.

    Args:
        record: a checked record.
        tokenizer: the base model's.
        max_length: tokens kept, BOS and EOS included.

    Returns:
        The example, which has no label at all where the prompt fills max_length.

    Raises:
        ValueError: max_length is less than 2.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    prompt = prompt_text(record.instruction, record.input)
    masked = len(tokenizer.encode(prompt, bos=True))
    tokens = tokenizer.encode(prompt + record.output, bos=True, eos=True)
    labels = [IGNORE_INDEX] * min(masked, len(tokens)) + tokens[masked:]
    return Example(record.index, tuple(tokens[:max_length]), tuple(labels[:max_length]))


def encode_records(
    records: Sequence[Record], tokenizer: Tokenizer, max_length: int
) -> tuple[list[Example], list[Problem]]:
    """Tokenise records and set those aside that leave no label.

    Args:
        records: checked records.
        tokenizer: the base model's.
        max_length: tokens kept per example.

    Returns:
        The usable examples in order, and one problem per record whose prompt fills max_length.
    """
    examples, problems = [], []
    for record in records:
        example = encode_record(record, tokenizer, max_length)
        if example.n_labels:
            examples.append(example)
        else:
            reason = f"its prompt leaves no label within {max_length} tokens (max_length, context)"
            problems.append(Problem(record.index, reason))
    return examples, problems


@dataclass(frozen=True)
class Dataset:
    """What one run trains on and is validated on.

    Attributes:
        train, held_out: examples that share no instruction with the same input.
        problems: by file, the records that are in neither, in the file's order.
        warnings: one line for each file with such records.
        digests: SHA-256 of each file.
    """

    train: list[Example]
    held_out: list[Example]
    problems: dict[str, list[Problem]]
    warnings: list[str]
    digests: dict[str, str]

    def skipped_lines(self) -> list[dict[str, str | int]]:
        """Every problem as plain data: file, record and reason."""
        return [
            {"file": file, "record": problem.index, "reason": problem.reason}
            for file, found in self.problems.items()
            for problem in found
        ]


def load_dataset(
    data: Path,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    val_data: Path | None = None,
    val_size: int | None = None,
    val_fraction: float = 0.0,
    seed: int = 0,
    strict: bool = False,
) -> Dataset:
    """Read, check, split and tokenise the data of one run.

    Args:
        data: instruction file to train on.
        tokenizer: the base model's.
        max_length: tokens kept per example.
        val_data: file to hold out in place of a part of `data`; what it asks is not trained on.
        val_size: records of `data` to hold out; None takes `val_fraction` of them, rounded down.
        val_fraction: see `val_size`.
        seed: of the choice of held-out records.
        strict: refuse records that cannot be used, instead of listing them.

    Returns:
        The examples, and every record that was set aside with its reason.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is unreadable or leaves nothing to use; or, with `strict`, a record
            cannot be used.
    """
    records, found = load_records(data)
    files = {str(data): (len(records) + len(found), found)}
    validation: list[Example] = []
    if val_data is not None:
        if Path(val_data).resolve() == Path(data).resolve():
            raise ValueError(f"val_data must be another file than data, got {val_data} for both")
        held_out, val_found = load_records(val_data)
        files[str(val_data)] = (len(held_out) + len(val_found), val_found)
        records, shared = remove_held_out(records, held_out)
        found += shared
        validation, unlabelled = encode_records(held_out, tokenizer, max_length)
        val_found += unlabelled
    train, unlabelled = encode_records(records, tokenizer, max_length)
    found += unlabelled
    for file, (total, problems) in files.items():
        problems.sort(key=lambda problem: problem.index)
        if len(problems) == total:
            raise ValueError(summarise(problems, total, file))
    if val_data is None:
        # sizes count what is really used
        usable = {example.index for example in train}
        records = [record for record in records if record.index in usable]
        size = int(val_fraction * len(records)) if val_size is None else val_size
        chosen = {record.index for record in split_records(records, size, seed)[1]}
        validation = [example for example in train if example.index in chosen]
        train = [example for example in train if example.index not in chosen]
    lines = [summarise(bad, total, file) for file, (total, bad) in files.items() if bad]
    if strict and lines:
        raise ValueError("; ".join(lines))
    digests = {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}
    problems = {file: bad for file, (_, bad) in files.items()}
    return Dataset(train, validation, problems, lines, digests)
