"""Semantic roles from CoNLL05's and CoNLL12's files: a sentence once for each of its predicates.

Three forms: lines `index word word ... ||| tag tag ...`, index the predicate's from 0; CoNLL05's
pairs of files X.words and X.props, whose columns, one for each predicate, hold brackets as
`(A0* * *)`; CoNLL12's X_gold_conll with the same brackets.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from llama_adapter.data.checked_files import FileProblem, numbered_lines, usable
from llama_adapter.tasks.conll_files import Row, Sentence, blocks, columns_of
from llama_adapter.tasks.spans import Span, against_tag, tags_of, to_iob2

BETWEEN = "|||"
NONE = "-"
_BRACKET = re.compile(r"(?:\(([^()*\s]+))?\*(\))?")
# of CoNLL12's columns, those around the ones of the predicates
_WORD, _BEFORE, _AFTER = 3, 11, 1
_VERB = "V"


def read_roles(path: str | Path) -> tuple[list[Sentence], list[FileProblem]]:
    """Sentences with the roles of one predicate each, from the form that a file's name tells.

    Args:
        path: X.words beside X.props, X_gold_conll, or any other name for lines with `|||`.

    Returns:
        A sentence for every predicate, in file order, and why others are not used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not UTF-8 or holds no usable sentence.
    """
    path = Path(path)
    if path.suffix == ".words":
        return read_props(path, path.with_suffix(".props"))
    if path.name.endswith("_gold_conll"):
        return read_gold_conll(path)
    return read_role_lines(path)


def read_role_lines(path: str | Path) -> tuple[list[Sentence], list[FileProblem]]:
    """Sentences of lines that `|||` parts in two; returns and errors as `read_roles`."""
    problems: list[FileProblem] = []
    sentences = []
    for number, line in numbered_lines(path):
        try:
            words, tags, predicate = _line(line)
        except ValueError as error:
            problems.append(FileProblem(number, str(error), str(path), "line"))
        else:
            sentences.append(Sentence(words, tags, str(path), number, predicate))
    return usable(sentences, problems, path)


def _line(line: str) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """Words, tags and the predicate of a line; ValueError where it is none."""
    texts = columns_of(line)
    if texts.count(BETWEEN) != 1 or texts[0] == BETWEEN:
        raise ValueError(
            f"must be `index words {BETWEEN} tags`, got {texts.count(BETWEEN)} {BETWEEN}"
        )
    middle = texts.index(BETWEEN)
    index, words, tags = texts[0], texts[1:middle], texts[middle + 1 :]
    if len(words) != len(tags):
        raise ValueError(f"must have a tag for each of {len(words)} words, got {len(tags)}")
    for tag in tags:
        reason = against_tag(tag)
        if reason is not None:
            raise ValueError(reason)
    if not index.isdecimal() or int(index) >= len(words):
        raise ValueError(f"index must be that of one of {len(words)} words, from 0, got {index!r}")
    return tuple(words), tuple(to_iob2(tags)), int(index)


def read_props(words: str | Path, props: str | Path) -> tuple[list[Sentence], list[FileProblem]]:
    """Sentences of CoNLL05's two files; returns and errors as `read_roles`.

    Args:
        words: a word a line, the first column.
        props: for each the predicate's lemma, or -, and the brackets of every predicate's roles.

    Raises:
        ValueError: also where the files have not the same number of sentences.
    """
    problems: list[FileProblem] = []
    sentences = []
    texts, roles = [*blocks(words)], [*blocks(props)]
    if len(texts) != len(roles):
        raise ValueError(
            f"{props}: must hold {len(texts)} sentences, as {words} does, got {len(roles)}"
        )
    for text, block in zip(texts, roles, strict=True):
        verbs = [place for place, row in enumerate(block) if row.columns[0] != NONE]
        if len(text) != len(block):
            reason = f"must have {len(text)} lines, as line {text[0].number} of {words} begins"
            reason += f", got {len(block)}"
            problems.append(FileProblem(block[0].number, reason, str(props), "line"))
            continue
        tokens = tuple(row.columns[0] for row in text)
        problem = _against_columns(block, 1 + len(verbs), props)
        if problem is not None:
            problems.append(problem)
            continue
        for verb, place in enumerate(verbs, 1):
            found = _brackets(block, verb, props)
            if isinstance(found, FileProblem):
                problems.append(found)
            else:
                tags = tuple(tags_of(found, len(block)))
                sentences.append(Sentence(tokens, tags, str(words), text[0].number, place))
    return usable(sentences, problems, props)


def read_gold_conll(path: str | Path) -> tuple[list[Sentence], list[FileProblem]]:
    """Sentences of one of CoNLL12's *_gold_conll files; returns and errors as `read_roles`.

    A predicate is where its column's role V begins. Lines that begin with # are no words.
    """
    problems: list[FileProblem] = []
    sentences = []
    for whole in blocks(path):
        block = [row for row in whole if not row.columns[0].startswith("#")]
        if not block:
            continue
        problem = _against_columns(block, max(_BEFORE + _AFTER, len(block[0].columns)), path)
        if problem is not None:
            problems.append(problem)
            continue
        tokens = tuple(row.columns[_WORD] for row in block)
        for column in range(_BEFORE, len(block[0].columns) - _AFTER):
            found = _brackets(block, column, path)
            if isinstance(found, FileProblem):
                problems.append(found)
                continue
            verb = next((span.start for span in found if span.type == _VERB), None)
            if verb is None:
                reason = f"column {column + 1} must have a role V, got none"
                problems.append(FileProblem(block[0].number, reason, str(path), "line"))
                continue
            tags = tuple(tags_of(found, len(block)))
            sentences.append(Sentence(tokens, tags, str(path), block[0].number, verb))
    return usable(sentences, problems, path)


def _against_columns(block: Sequence[Row], wanted: int, path: str | Path) -> FileProblem | None:
    """Why a sentence's lines have not all this number of columns, or None."""
    for row in block:
        if len(row.columns) != wanted:
            reason = f"must have {wanted} columns, got {len(row.columns)}"
            return FileProblem(row.number, reason, str(path), "line")
    return None


def _brackets(block: Sequence[Row], column: int, path: str | Path) -> list[Span] | FileProblem:
    """The roles that a column's brackets open and close, or why they are none."""
    spans: list[Span] = []
    opened: tuple[int, str] | None = None
    for place, row in enumerate(block):
        found = _BRACKET.fullmatch(row.columns[column])
        reason = None
        if found is None:
            reason = f"must be *, (ROLE*, *) or (ROLE*), got {row.columns[column]!r}"
        elif found[1] and opened:
            reason = f"opens {found[1]} within {opened[1]}"
        elif found[2] and not (found[1] or opened):
            reason = "closes what was not opened"
        if found is None or reason is not None:
            return FileProblem(row.number, f"column {column + 1}: {reason}", str(path), "line")
        if found[1]:
            opened = place, found[1]
        if found[2] and opened:
            spans.append(Span(opened[0], place + 1, opened[1]))
            opened = None
    if opened:
        last = block[-1].number
        return FileProblem(
            last, f"column {column + 1}: {opened[1]} is not closed", str(path), "line"
        )
    return spans
