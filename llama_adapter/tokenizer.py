"""Text to token ids and back: sentencepiece, LLaMA 3's tiktoken vocabulary, tokenizer.json.

Beginning and end marks are added only where asked for, and marks spelled out in a text stay text.
"""

import base64
import binascii
import hashlib
import importlib
import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from sentencepiece import SentencePieceProcessor

# LLaMA 3: how a text is cut into words, within which bytes are merged
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LONG_BLANKS = re.compile(r"\s{25000}")
# its marks follow the vocabulary: beginning, end of a text, and of a message and of a turn
LLAMA3_MARKS, LLAMA3_BOS, LLAMA3_EOS, LLAMA3_ENDS = 256, 0, 1, (1, 8, 9)


class _Codec(Protocol):
    """What the kinds of tokenizer files have in common."""

    vocab_size: int
    bos_id: int
    eos_id: int
    end_ids: frozenset[int]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class Tokenizer:
    """A tokenizer file.

    Attributes:
        path: the file it was read from.
        vocab_size: number of token ids.
        bos_id, eos_id: beginning and end of a text.
        end_ids: every id that ends an answer: eos_id, and the ends of a turn in chat models.
        digest: SHA-256 of what decides the ids of a text: the file and the two marks.
    """

    def __init__(self, path: str | Path) -> None:
        """Read a tokenizer; its content tells the kind.

        Args:
            path: a sentencepiece `tokenizer.model` (LLaMA 1 and 2, Mistral), LLaMA 3's tiktoken
                `tokenizer.model`, or a `tokenizer.json`, whose marks are named by
                tokenizer_config.json, generation_config.json or config.json beside it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is of no known kind or damaged, has no beginning or end mark, or the
                library for its kind is not installed.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"tokenizer file {self.path} does not exist")
        data = self.path.read_bytes()
        self._codec = _kind(self.path, data)(self.path, data)
        self.vocab_size: int = self._codec.vocab_size
        self.bos_id: int = self._codec.bos_id
        self.eos_id: int = self._codec.eos_id
        self.end_ids: frozenset[int] = self._codec.end_ids
        for name, value in (("beginning", self.bos_id), ("end", self.eos_id)):
            if not 0 <= value < self.vocab_size:
                raise ValueError(f"tokenizer {self.path} must have a mark for the {name} of a text")
        kind = f"{type(self._codec).__name__} {self.bos_id} {self.eos_id} "
        self.digest: str = hashlib.sha256(kind.encode() + data).hexdigest()

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of `text`, between the beginning and end marks that are asked for.

        Raises:
            ValueError: the text holds half of a surrogate pair, as bytes that are no UTF-8 leave.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text must be UTF-8, got {text[error.start]!r}") from None
        ids = self._codec.encode(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; marks have none, and bytes that are no character show as U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        outside = [i for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise ValueError(f"token ids must be in 0..{self.vocab_size - 1}, got {outside[0]}")
        return self._codec.decode(list(ids))


def find_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder: tokenizer.model before tokenizer.json.

    A fine-tuned model whose end mark was added behind tokenizer.model's tokens has it in
    tokenizer.json alone, which is the one then.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: as `Tokenizer`, or the model's end mark is in no file.
    """
    paths = [folder / name for name in ("tokenizer.model", "tokenizer.json")]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no tokenizer.model and no tokenizer.json: copy it from where the "
            "weights came"
        )
    for path in found:
        tokenizer = Tokenizer(path)
        ends = _listed(folder, "generation_config.json", "eos") + _listed(
            folder, "config.json", "eos"
        )
        if all(end < tokenizer.vocab_size for end in ends):
            return tokenizer
    raise ValueError(
        f"{folder} says that texts end at token {max(ends)}, which {found[-1].name} does not have: "
        "copy tokenizer.json into the folder"
    )


class _SentencePiece:
    """A sentencepiece model."""

    def __init__(self, path: Path, data: bytes) -> None:
        model = SentencePieceProcessor()
        try:
            model.load_from_serialized_proto(data)
        except RuntimeError:
            raise ValueError(
                f"tokenizer {path} is not a sentencepiece model, or is damaged"
            ) from None
        self.vocab_size: int = model.vocab_size()
        self.bos_id: int = model.bos_id()
        self.eos_id: int = model.eos_id()
        self.end_ids = frozenset({self.eos_id})
        self.encode, self.decode = model.encode, model.decode


class _Tiktoken:
    """LLaMA 3's vocabulary: a base64 token and its rank a line, and 256 marks behind them."""

    def __init__(self, path: Path, data: bytes) -> None:
        tiktoken = _library("tiktoken", path)
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(data.splitlines()):
            try:
                token, rank = line.split()
                value, written = base64.b64decode(token, validate=True), int(rank)
            except (ValueError, binascii.Error):
                value, written = b"", -1
            if not value or written != number or value in ranks:
                raise ValueError(
                    f"tokenizer {path}: line {number + 1} must be a new base64 token and the rank "
                    f"{number}, got {line[:40].decode('ascii', 'replace')!a}"
                )
            ranks[value] = number
        for byte in range(256):
            if bytes([byte]) not in ranks:
                raise ValueError(f"tokenizer {path} must have a token for each byte, lacks {byte}")
        count = len(ranks)
        # marks are never looked for in a text, so their names are free
        marks = {f"<|mark_{i}|>": count + i for i in range(LLAMA3_MARKS)}
        self._first_mark = count
        self._model = tiktoken.Encoding(
            path.name, pat_str=LLAMA3_WORDS, mergeable_ranks=ranks, special_tokens=marks
        )
        self.vocab_size = count + LLAMA3_MARKS
        self.bos_id, self.eos_id = count + LLAMA3_BOS, count + LLAMA3_EOS
        self.end_ids = frozenset(count + end for end in LLAMA3_ENDS)

    def encode(self, text: str) -> list[int]:
        # its regular expression overflows on longer runs of blanks, which Meta cuts there too
        cuts = [found.end() for found in _LONG_BLANKS.finditer(text)]
        parts = (text[a:b] for a, b in pairwise([0, *cuts, len(text)]))
        return [i for part in parts for i in self._model.encode_ordinary(part)]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([i for i in ids if i < self._first_mark], errors="replace")


class _Json:
    """A tokenizer.json, read by the tokenizers library."""

    def __init__(self, path: Path, data: bytes) -> None:
        tokenizers = _library("tokenizers", path)
        try:
            content = json.loads(data)
            if not isinstance(content, dict) or not {"model", "added_tokens"} <= content.keys():
                raise ValueError("it has no model or no added_tokens")
            model = tokenizers.Tokenizer.from_buffer(data)
        except (ValueError, RecursionError) as error:
            line = " ".join(str(error).split())[:200]
            raise ValueError(f"tokenizer {path} is damaged, or no tokenizer.json: {line}") from None
        model.no_truncation()
        model.no_padding()
        ids = model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        self.bos_id = _mark(path, ids, "bos")[0]
        self.eos_id, *more = _mark(path, ids, "eos")
        self.end_ids = frozenset({self.eos_id, *more})
        marks = [model.id_to_token(i) for i in (self.bos_id, self.eos_id) if i >= 0]
        # what is not special would be found in a text
        model.add_special_tokens([mark for mark in marks if mark])
        model.encode_special_tokens = True
        self._model = model

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=True)


def _kind(path: Path, data: bytes) -> type[_SentencePiece] | type[_Tiktoken] | type[_Json]:
    """The kind of a tokenizer file, told by its beginning."""
    if path.suffix == ".json":
        return _Json
    first = data.split(b"\n", 1)[0].split()
    return _Tiktoken if len(first) == 2 and first[1].isdigit() else _SentencePiece


def _mark(path: Path, ids: dict[str, int], name: str) -> list[int]:
    """Ids of a mark: the one that is named, then those that generation_config.json adds."""
    folder = path.parent
    named = _beside(folder / "tokenizer_config.json").get(f"{name}_token")
    if isinstance(named, dict):
        named = named.get("content")
    found = [ids[named]] if isinstance(named, str) and named in ids else []
    for file in ("generation_config.json", "config.json"):
        numbers = [i for i in _listed(folder, file, name) if i in ids.values()]
        found += [i for i in numbers if i not in found]
        if found and name == "bos":
            break
    return found or [-1]


def _listed(folder: Path, file: str, name: str) -> list[int]:
    """Ids of a mark in a configuration file of the folder."""
    value = _beside(folder / file).get(f"{name}_token_id")
    return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]


def _beside(path: Path) -> dict[str, Any]:
    """The object of a JSON file beside the tokenizer, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _library(name: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"tokenizer {path} needs {name} to be read: "
            "pip install 'llama-adapter-kernels[tokenizers]'"
        ) from None
