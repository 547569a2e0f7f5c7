"""Tagged sentences from the CoNLL tasks' own files, and predictions as conlleval takes them.

CoNLL03: `word POS chunk entity`, blank lines between sentences, -DOCSTART- between documents.
CoNLL04: columns, or a JSON list of {"tokens", "entities": [{"type", "start", "end"}]}: entities
(Loc, Peop, Org, Other), which Table 10 has after P-tuning v2, though the paper cites CoNLL-2004's
task of roles. Roles of CoNLL05 and CoNLL12: `srl_files`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.data.checked_files import (
    INTEGER,
    LIST,
    TEXT,
    FileProblem,
    against,
    json_entries,
    numbered_lines,
    read_json,
    usable,
)
from llama_adapter.tasks.spans import Span, against_tag, tags_of, to_iob2

DOCUMENT = "-DOCSTART-"
# columns are parted by these alone: other blanks may be in a word
_BETWEEN = re.compile(r"[ \t]+")


@dataclass(frozen=True)
class Sentence:
    """Words with their tags.

    Attributes:
        words: of the sentence.
        tags: one for each, in IOB2.
        path: the file that it is from.
        at: where it begins there: a line from 1, or an entry of a list from 0.
        predicate: the word whose roles the tags are, from 0; None where they are entities.
    """

    words: tuple[str, ...]
    tags: tuple[str, ...]
    path: str
    at: int
    predicate: int | None = None


@dataclass(frozen=True)
class Row:
    """A line's number and its columns."""

    number: int
    columns: tuple[str, ...]


def columns_of(line: str) -> tuple[str, ...]:
    """What blanks and tabs part in a line."""
    return tuple(_BETWEEN.split(line.strip(" \t")))


def blocks(path: str | Path) -> Iterator[list[Row]]:
    """The runs of lines of a file of columns that blank lines or documents' beginnings part.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8.
    """
    block: list[Row] = []
    for number, line in numbered_lines(path):
        row = Row(number, columns_of(line))
        new = row.columns[0] == DOCUMENT
        # lines that hold blanks alone have no number here
        if block and (new or number > block[-1].number + 1):
            yield block
            block = []
        if not new:
            block.append(row)
    if block:
        yield block


def read_columns(
    path: str | Path, *, columns: int | None = None
) -> tuple[list[Sentence], list[FileProblem]]:
    """Sentences of a file with a word and its columns on each line, the last one the tag.

    Tags may be IOB1, as CoNLL03's are, or IOB2; a sentence with a line that is neither, or that has
    another number of columns, is not used.

    Args:
        path: the file.
        columns: how many a line has; None: at least two, as many as the sentence's first line.

    Returns:
        The sentences, in file order, and why others are not used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8 or holds no usable sentence.
    """
    problems: list[FileProblem] = []
    sentences = []
    for block in blocks(path):
        wanted = columns or max(2, len(block[0].columns))
        for row in block:
            reason = against_tag(row.columns[-1])
            if len(row.columns) != wanted:
                reason = f"must have {wanted} columns, got {len(row.columns)}"
            if reason is not None:
                problems.append(FileProblem(row.number, reason, str(path), "line"))
                break
        else:
            words, tags = ([row.columns[place] for row in block] for place in (0, -1))
            first = block[0].number
            sentences.append(Sentence(tuple(words), tuple(to_iob2(tags)), str(path), first))
    return usable(sentences, problems, path)


def read_conll03(path: str | Path) -> tuple[list[Sentence], list[FileProblem]]:
    """Sentences of CoNLL03's four columns; arguments and errors as `read_columns`."""
    return read_columns(path, columns=4)


def read_conll04(path: str | Path) -> tuple[list[Sentence], list[FileProblem]]:
    """Sentences of CoNLL04's entities: a JSON list where the name ends in .json, else columns.

    In the list an entity's words go from start to before end; relations are not used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, no list, or holds no usable sentence.
    """
    if Path(path).suffix.lower() != ".json":
        return read_columns(path)
    problems: list[FileProblem] = []
    sentences = []
    entries = json_entries(path, read_json(path), None, problems)
    for number, entry in entries.having({"tokens": LIST, "entities": LIST}):
        try:
            words = _words(entry["tokens"])
            spans = [*_entities(entry["entities"])]
            tags = tags_of(spans, len(words))
        except ValueError as error:
            entries.refuse(number, str(error))
        else:
            sentences.append(Sentence(words, tuple(tags), str(path), number))
    return usable(sentences, problems, path)


def _words(tokens: Sequence[object]) -> tuple[str, ...]:
    """Tokens of an entry; ValueError where one is no word."""
    words = []
    for place, token in enumerate(tokens):
        if not isinstance(token, str) or not token or any(map(str.isspace, token)):
            raise ValueError(f"tokens {place}: must be a word, got {token!r}")
        words.append(token)
    if not words:
        raise ValueError("tokens is empty")
    return tuple(words)


def _entities(entities: Iterable[object]) -> Iterator[Span]:
    """Entities of an entry; ValueError where one is none."""
    for place, entity in enumerate(entities):
        reason = against(entity, {"type": TEXT, "start": INTEGER, "end": INTEGER})
        if reason is not None:
            raise ValueError(f"entities {place}: {reason}")
        assert isinstance(entity, dict)
        yield Span(entity["start"], entity["end"], entity["type"])


def write_conlleval(
    path: str | Path, sentences: Sequence[Sentence], predictions: Sequence[Sequence[str]]
) -> None:
    """Write predictions as conlleval takes them: `word right found`, a blank line after a sentence.

    Args:
        path: the file to write or replace.
        sentences: with the right tags.
        predictions: for each its predicted tags.
    """
    lines = []
    for sentence, found in zip(sentences, predictions, strict=True):
        rows = zip(sentence.words, sentence.tags, found, strict=True)
        lines += [*map(" ".join, rows), ""]
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
