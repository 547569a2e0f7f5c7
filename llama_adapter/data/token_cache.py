"""Instruction files as tokens on disk: tokenised once, then mapped into memory, never read whole.

A file's name is a digest of all that decides its tokens; a file is whole or absent, and what is
damaged is made anew. All of them may be deleted whenever no run is starting.

    header, JSON in 512 bytes | WORDs, filled up to 8 | a ROW a record | problems, JSON
"""

import hashlib
import json
import tempfile
import warnings
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, overload

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from llama_adapter.caches import cache_folder
from llama_adapter.checkpoints.atomic import TEMPORARY_SUFFIX, replacing, temporary_prefix
from llama_adapter.data.examples import IGNORE_INDEX, Example
from llama_adapter.data.items import CHUNK, check_file, is_lines, stream_items
from llama_adapter.data.mixture import check_any, encode_any, templates
from llama_adapter.data.records import Problem
from llama_adapter.data.split import question_of
from llama_adapter.tokenizer import Tokenizer

# another number wherever the same records would get other tokens, labels or problems
FORMAT = 2
HEADER = 512
# first token, their number, labels among them, bytes of the image's path or 0 for none, place in
# the file, what is asked
ROW = np.dtype(
    [
        ("begin", "<i8"), ("length", "<i4"), ("labels", "<i4"), ("image", "<i8"),
        ("index", "<i8"), ("question", "<u8"),
    ],
    align=True,
)  # fmt: skip
# those of a record are its tokens, then the path of its image in UTF-8; a token without a label is
# there as its complement, below zero: answers of several turns need no table
WORD = np.dtype("<i4")
# records between two writes
_FLUSH = 1024


def default_folder() -> Path:
    """Where token files lie unless told otherwise: among the user's caches.

    Raises:
        OSError: the user has no home.
    """
    return cache_folder("tokens", "--token-cache")


@dataclass(frozen=True)
class TokenFile:
    """The tokens of an instruction file.

    Attributes:
        words: (total,) int32, in memory only where they are looked at.
        rows: (n,) ROW, one for each record that could be read, in the file's order.
        items: values in the file.
        problems: those of them that are no records.
        digest: SHA-256 of the instruction file.
    """

    words: NDArray[np.int32]
    rows: NDArray[Any]
    items: int
    problems: list[Problem]
    digest: str

    def example(self, row: int) -> Example:
        """The record of a row."""
        found = self.rows[row]
        begin, end = int(found["begin"]), int(found["begin"] + found["length"])
        words = self.words[begin:end]
        tokens = np.where(words < 0, ~words, words).tolist()
        labels = np.where(words < 0, IGNORE_INDEX, words).tolist()
        return Example(int(found["index"]), tuple(tokens), tuple(labels), self.image(row))

    def image(self, row: int) -> str | None:
        """The path of a row's image as the instruction file has it."""
        found = self.rows[row]
        begin, size = int(found["begin"] + found["length"]), int(found["image"])
        words = self.words[begin : begin + _words(size)]
        return words.tobytes()[:size].decode() if size else None


def _words(size: int) -> int:
    """WORDs that hold so many bytes."""
    return -(-size // WORD.itemsize)


class Examples(Sequence[Example]):
    """Some records of a token file, each made an `Example` when it is asked for."""

    def __init__(self, source: TokenFile, rows: NDArray[np.integer]) -> None:
        """Choose rows.

        Args:
            source: the token file.
            rows: (n,), in the order wanted.
        """
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> "Examples": ...

    def __getitem__(self, index: int | slice) -> "Example | Examples":
        if isinstance(index, slice):
            return Examples(self._source, self._rows[index])
        return self._source.example(int(self._rows[index]))


def tokenised(
    path: str | Path,
    tokenizer: Tokenizer,
    max_length: int,
    folder: Path | None = None,
    progress: bool | None = False,
) -> TokenFile:
    """The tokens of an instruction file, made now if they are not in the cache.

    Args:
        path: the instruction file.
        tokenizer: the base model's.
        max_length: tokens kept per record.
        folder: of the cache; None is `default_folder`.
        progress: show a bar on stderr where it takes seconds; None shows it on a terminal.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the folder cannot be written; the message names it.
        ValueError: the file is unreadable, or changed meanwhile.
    """
    path, folder = check_file(path), default_folder() if folder is None else folder
    digest = _digest(path)
    key = _key(digest, is_lines(path), tokenizer, max_length)
    target = folder / f"{key}.tokens"
    try:
        found = _read(target, key, digest)
        if found is not None:
            return found
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(target) as alone:
            # another process may have made it meanwhile
            found = _read(target, key, digest)
            if found is not None:
                return found
            if target.exists():
                warnings.warn(f"{target} is damaged: its records are tokenised again", stacklevel=2)
            if alone:
                for remains in folder.glob(f"{temporary_prefix(target)}*{TEMPORARY_SUFFIX}"):
                    remains.unlink(missing_ok=True)
            with replacing(target) as file, tempfile.TemporaryFile(dir=folder) as side:
                _write(_Parts(file, side), key, path, tokenizer, max_length, progress)
                if not path.is_file() or _digest(path) != digest:
                    raise ValueError(f"{path}: was changed while it was read")
    except OSError as error:
        raise OSError(
            f"tokens cannot be cached in {folder} ({error.strerror or error}): name another "
            "folder with --token-cache"
        ) from error
    found = _read(target, key, digest)
    if found is None:
        raise OSError(f"{target} was damaged right after it was written")
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(digest: str, lines: bool, tokenizer: Tokenizer, max_length: int) -> str:
    """Of all that decides the tokens."""
    parts = [FORMAT, digest, lines, tokenizer.digest, templates(), max_length]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@contextmanager
def _alone(target: Path) -> Iterator[bool]:
    """Let one process at a time make a file; the system frees a dead one's place.

    It saves work and is not what keeps files whole: a system without such locks gives False.
    """
    with (target.parent / f".{target.stem}.lock").open("a") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        except (ImportError, OSError):
            yield False
        else:
            yield True


def _read(target: Path, key: str, digest: str) -> TokenFile | None:
    """A token file, if there is one and it is whole."""
    try:
        data = np.memmap(target, np.uint8, "r")
    except FileNotFoundError:
        return None
    except ValueError:
        # it is empty
        data = np.zeros(0, np.uint8)
    try:
        header = json.loads(bytes(data[:HEADER]))
        words_end = HEADER + header["words"] * WORD.itemsize
        rows_begin = words_end + -words_end % ROW.alignment
        rows_end = rows_begin + header["records"] * ROW.itemsize
        whole = header["key"] == key and len(data) == rows_end + header["problems"]
        if whole and _sealed(header, hashlib.sha256(data[HEADER:].data)) == header:
            return TokenFile(
                words=data[HEADER:words_end].view(WORD),
                rows=data[rows_begin:rows_end].view(ROW),
                items=header["items"],
                problems=[Problem(**found) for found in json.loads(bytes(data[rows_end:]))],
                digest=digest,
            )
    except (ValueError, KeyError, TypeError):
        pass
    return None


def _sealed(header: dict[str, Any], content: "hashlib._Hash") -> dict[str, Any]:
    """A header with the digest of the content behind it and of itself."""
    facts = {name: value for name, value in header.items() if name != "sha256"}
    content.update(json.dumps(facts, sort_keys=True).encode())
    return facts | {"sha256": content.hexdigest()}


class _Parts:
    """A token file while it is written: its rows wait in another until all words are there."""

    def __init__(self, file: BinaryIO, side: IO[bytes]) -> None:
        self.file, self.side = file, side
        self.words = self.records = 0
        self._checked = hashlib.sha256()
        self._pending, self._rows = array("i"), []
        file.write(bytes(HEADER))

    def add(self, example: Example, question: int) -> None:
        """Take one record."""
        begin = self.words + len(self._pending)
        path = (example.image or "").encode()
        sizes = len(example.tokens), example.n_labels, len(path)
        self._rows.append((begin, *sizes, example.index, question))
        pairs = zip(example.tokens, example.labels, strict=True)
        self._pending.extend(~token if label == IGNORE_INDEX else token for token, label in pairs)
        padded = path.ljust(_words(len(path)) * WORD.itemsize, b"\0")
        self._pending.extend(np.frombuffer(padded, WORD).tolist())
        if len(self._rows) == _FLUSH:
            self._flush()

    def finish(self, header: dict[str, Any], problems: Sequence[Problem]) -> None:
        """Write what comes behind the tokens, and the header at last."""
        self._flush()
        self._put(bytes(-self.words * WORD.itemsize % ROW.alignment))
        self.side.seek(0)
        while data := self.side.read(CHUNK):
            self._put(data)
        listed = json.dumps([asdict(problem) for problem in problems]).encode()
        self._put(listed)
        header |= {"words": self.words, "records": self.records, "problems": len(listed)}
        self.file.seek(0)
        self.file.write(json.dumps(_sealed(header, self._checked)).encode().ljust(HEADER))

    def _flush(self) -> None:
        self._put(np.array(self._pending, WORD).tobytes())
        self.side.write(np.array(self._rows, ROW).tobytes())
        self.words += len(self._pending)
        self.records += len(self._rows)
        self._pending, self._rows = array("i"), []

    def _put(self, data: bytes) -> None:
        self._checked.update(data)
        self.file.write(data)


def _items(path: Path) -> Iterator[Any]:
    """The file's values; that it cannot be read is no fault of the cache's folder."""
    try:
        yield from stream_items(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error


def _write(
    parts: _Parts,
    key: str,
    path: Path,
    tokenizer: Tokenizer,
    max_length: int,
    progress: bool | None,
) -> None:
    """Tokenise a file, with little of it in memory."""
    problems: list[Problem] = []
    items = 0
    hidden = None if progress is None else not progress
    with tqdm(
        _items(path), "tokenising", unit=" records", delay=1, disable=hidden, leave=False
    ) as bar:
        for item in bar:
            record = check_any(items, item)
            items += 1
            if isinstance(record, Problem):
                problems.append(record)
            else:
                example = encode_any(record, tokenizer, max_length)
                parts.add(example, question_of(record))
    parts.finish({"key": key, "items": items}, problems)
