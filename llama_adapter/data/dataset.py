"""The data of one run: what it trains on, what is held out, what cannot be used and why."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama_adapter.data.examples import Example
from llama_adapter.data.records import Problem, summarise
from llama_adapter.data.split import asked_again, hold_out
from llama_adapter.data.token_cache import Examples, TokenFile, tokenised
from llama_adapter.tokenizer import Tokenizer

# of paths of images, as the records have them, those that cannot be used, and why
Unusable = Callable[[Sequence[str]], Mapping[str, str]]


@dataclass(frozen=True)
class Dataset:
    """What one run trains on and is validated on.

    Attributes:
        train, held_out: examples that share no instruction with the same input; of `load_dataset`,
            each is read from disk when it is asked for.
        problems: by file, the records that are in neither, in the file's order.
        warnings: one line for each file with such records.
        digests: SHA-256 of each file.
        with_image: (n,), which records of `train` are about a picture.
    """

    train: Sequence[Example]
    held_out: Sequence[Example]
    problems: dict[str, list[Problem]]
    warnings: list[str]
    digests: dict[str, str]
    with_image: NDArray[np.bool_]

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
    token_cache: Path | None = None,
    unusable: Unusable | None = None,
    progress: bool | None = False,
) -> Dataset:
    """Check, split and tokenise the data of one run, or take its tokens from the cache.

    In memory are some tens of bytes for each record, whatever its length, and some hundreds for one
    that cannot be used.

    Args:
        data: instruction file to train on.
        tokenizer: the base model's.
        max_length: tokens kept per example.
        val_data: file to hold out in place of a part of `data`; what it asks is not trained on.
        val_size: records of `data` to hold out; None takes `val_fraction` of them, rounded down.
        val_fraction: see `val_size`.
        seed: of the choice of held-out records.
        strict: refuse records that cannot be used, instead of listing them.
        token_cache: folder of the token files; None is `token_cache.default_folder`.
        unusable: looks at the pictures before they are needed; None where none are taken.
        progress: show a bar on stderr while a large file is tokenised; None on a terminal.

    Returns:
        The examples, and every record that was set aside with its reason.

    Raises:
        FileNotFoundError: a file does not exist.
        OSError: the cache cannot be written.
        ValueError: a file is unreadable or leaves nothing to use; or has pictures where none are
            taken; or, with `strict`, a record cannot be used.
    """
    if val_data is not None and Path(val_data).resolve() == Path(data).resolve():
        raise ValueError(f"val_data must be another file than data, got {val_data} for both")
    paths = [data] if val_data is None else [data, val_data]
    files = {str(p): tokenised(p, tokenizer, max_length, token_cache, progress) for p in paths}
    problems = {file: list(found.problems) for file, found in files.items()}
    own, *other = files.values()
    kept = {file: np.ones(len(found.rows), bool) for file, found in files.items()}
    if other:
        rows, held_rows = own.rows, other[0].rows
        for place, asked in asked_again(rows["question"], held_rows["question"]).items():
            reason = f"asks the same as held-out record {held_rows['index'][asked]}"
            problems[str(data)].append(Problem(int(rows["index"][place]), reason))
            kept[str(data)][place] = False
    for file, found in files.items():
        bare = kept[file] & (found.rows["labels"] == 0)
        kept[file] &= ~bare
        reason = f"its prompt leaves no label within {max_length} tokens (max_length, context)"
        problems[file] += [Problem(int(index), reason) for index in found.rows["index"][bare]]
        for row, why in _bad_pictures(file, found, kept[file], unusable):
            problems[file].append(Problem(int(found.rows["index"][row]), why))
            kept[file][row] = False
        problems[file].sort(key=lambda problem: problem.index)
        if len(problems[file]) == found.items:
            raise ValueError(summarise(problems[file], found.items, file))
    train = np.flatnonzero(kept[str(data)])
    if other:
        held_out = Examples(other[0], np.flatnonzero(kept[str(val_data)]))
    else:
        # sizes count what is really used
        size = int(val_fraction * len(train)) if val_size is None else val_size
        chosen = hold_out(own.rows["question"][train], size, seed)
        held_out, train = Examples(own, train[chosen]), train[~chosen]
    lines = [summarise(bad, files[file].items, file) for file, bad in problems.items() if bad]
    if strict and lines:
        raise ValueError("; ".join(lines))
    digests = {file: found.digest for file, found in files.items()}
    with_image = own.rows["image"][train] > 0
    return Dataset(Examples(own, train), held_out, problems, lines, digests, with_image)


def _bad_pictures(
    file: str, found: TokenFile, kept: NDArray[np.bool_], unusable: Unusable | None
) -> list[tuple[int, str]]:
    """Rows of a file whose picture cannot be used, and why."""
    rows = np.flatnonzero(kept & (found.rows["image"] > 0))
    if not len(rows):
        return []
    if unusable is None:
        raise ValueError(
            f"{file}: record {found.rows['index'][rows[0]]}, counted from 0, has an image: give "
            "--images, the folder that its path starts from, and --vision-model, an encoder's"
        )
    paths = [found.image(int(row)) or "" for row in rows]
    bad = unusable(list(dict.fromkeys(paths)))
    return [(int(row), bad[path]) for row, path in zip(rows, paths, strict=True) if path in bad]
