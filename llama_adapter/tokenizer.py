"""Text to token ids and back, for the sentencepiece models of LLaMA 1 and 2.

Beginning and end marks are added only where asked for, and marks spelled out in a text stay text.
"""

from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor


class Tokenizer:
    """A sentencepiece model.

    Attributes:
        path: the file it was read from.
        vocab_size: number of token ids.
        bos_id, eos_id: beginning and end of a text.
    """

    def __init__(self, path: str | Path) -> None:
        """Read a tokenizer.

        Args:
            path: a sentencepiece `tokenizer.model`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a sentencepiece model, or has no beginning or end mark.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"tokenizer file {self.path} does not exist")
        self._model = _read_model(self.path)
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        for name, value in (("beginning", self.bos_id), ("end", self.eos_id)):
            if value < 0:
                raise ValueError(f"tokenizer {self.path} must have a mark for the {name} of a text")

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of `text`, between the beginning and end marks that are asked for.

        Raises:
            ValueError: the text holds half of a surrogate pair, as bytes that are no UTF-8 leave.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text must be UTF-8, got {text[error.start]!r}") from None
        ids: list[int] = self._model.encode(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; beginning and end marks have none.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        outside = [i for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise ValueError(f"token ids must be in 0..{self.vocab_size - 1}, got {outside[0]}")
        return self._model.decode(list(ids))


def _read_model(path: Path) -> SentencePieceProcessor:
    data = path.read_bytes()
    first_line = data.split(b"\n", 1)[0].split()
    # LLaMA 3's file is text, a base64 token and its rank a line
    if len(first_line) == 2 and first_line[1].isdigit():
        raise ValueError(
            f"tokenizer {path} is a tiktoken vocabulary (LLaMA 3); "
            "only sentencepiece models (LLaMA 1 and 2) are read"
        )
    model = SentencePieceProcessor()
    try:
        model.load_from_serialized_proto(data)
    except RuntimeError:
        raise ValueError(f"tokenizer {path} is not a sentencepiece model, or is damaged") from None
    return model
