"""What a request is continued with, and how tokens become text that may be shown.

A row's pieces of text concatenate to its completion's exactly: what could become a stop string, or
is part of a character, is held back until it is decided. Of a cancelled row the completion alone
has what was held back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llama_adapter.sampling import SamplingConfig, row_draws
from llama_adapter.tokenizer import Tokenizer

# what a decoder shows in place of bytes that are no character, or not yet one
REPLACEMENT = "\ufffd"
FIRST_DRAWS = 64


@dataclass(frozen=True)
class Completion:
    """What a prompt was continued with.

    Attributes:
        text: continues the prompt's text exactly, a leading space included; ends before a stop
            string, and without the bytes of an unfinished last character.
        tokens: every generated id, those of a stop string included, EOS not.
        finish_reason: "eos", "stop" (a stop string), "length" (max_new_tokens, or the context),
            "cancelled", or "error": the logits were not finite.
        prompt_tokens: tokens of the prompt, BOS included.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """The next decided text of one row; `completion` is given with the row's last piece only."""

    row: int
    text: str
    completion: Completion | None = None


class Text:
    """One row's text so far: whole characters, held back where a stop string may begin."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: tuple[str, ...]) -> None:
        """Begin behind the tokens before it, of which the last few count."""
        self._decode = tokenizer.decode
        self._stop = stop
        self._starts = [text[:n] for text in stop for n in range(1, len(text))]
        self._window = list(before)
        self._restart()
        self._given = 0
        self.text = ""
        self.stopped = False

    def _restart(self) -> None:
        # decoding starts at tokens whose text is out already, because the first piece of a decoded
        # text loses its leading space; at whole characters, because some decoders give up a run of
        # bytes that begins within one
        for count in range(1, 5):
            kept = self._window[-count:]
            if REPLACEMENT not in self._decode(kept):
                break
        else:
            kept = self._window[-1:]
        self._window = kept
        self._skip = len(self._decode(kept))

    def add(self, token: int) -> None:
        """Append one generated token."""
        self._window.append(token)
        text = self._decode(self._window)[self._skip :]
        if text and not text.endswith(REPLACEMENT):
            self._restart()
            self._extend(text)

    def end(self) -> None:
        """Decide everything: no token follows."""
        self._extend(self._decode(self._window)[self._skip :].rstrip(REPLACEMENT))

    def _extend(self, text: str) -> None:
        self.text += text
        # what was given out cannot be the beginning of a stop string
        found = [self.text.find(stop, self._given) for stop in self._stop]
        cut = min((at for at in found if at >= 0), default=None)
        if cut is not None:
            self.text = self.text[:cut]
            self.stopped = True

    def take(self, *, final: bool) -> str:
        """Text that is decided and was not taken before; all of it where `final`."""
        start = self._given
        held = 0 if final else self._held()
        self._given = len(self.text) - held
        return self.text[start : self._given]

    def _held(self) -> int:
        """Characters at the end that a stop string could begin with."""
        return max((len(start) for start in self._starts if self.text.endswith(start)), default=0)


def encode_prompt(text: str, tokenizer: Tokenizer, name: str) -> list[int]:
    """Token ids of a full prompt, BOS first.

    Raises:
        ValueError: the text, called by its name, is no string or no UTF-8.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, got {type(text).__name__}")
    try:
        return tokenizer.encode(text, bos=True)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


class Row:
    """One prompt and what has been generated for it.

    Attributes:
        index: what the row's pieces are told apart by.
        prompt: token ids, BOS first.
        sampling: how its tokens are chosen.
        limit: new tokens at most: those asked for, within the model's context.
        tokens: ids generated so far.
    """

    def __init__(
        self,
        index: int,
        seed: int,
        text: str,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        context: int,
        name: str = "text",
    ) -> None:
        """Encode a prompt.

        Args:
            index: see above.
            seed: with `sampling.seed`, of the row's random numbers.
            text: the full prompt; encoded with BOS.
            tokenizer: the model's.
            sampling: how tokens are chosen and when to stop.
            context: tokens of prompt and answer that there is room for.
            name: of the text, for messages.

        Raises:
            ValueError: the text is empty or leaves no room in the context.
        """
        self.index, self.sampling = index, sampling
        self.prompt = encode_prompt(text, tokenizer, name)
        if len(self.prompt) < 2:
            raise ValueError(f"{name} must hold at least one token besides BOS, got none")
        if len(self.prompt) >= context:
            raise ValueError(
                f"{name} must have at most {context - 1} tokens, one less than the context "
                f"of {context}, got {len(self.prompt)}"
            )
        self.limit = min(sampling.max_new_tokens, context - len(self.prompt))
        self.tokens: list[int] = []
        self._ends = tokenizer.end_ids
        self._text = Text(tokenizer, self.prompt, sampling.stop)
        self._seed = seed
        self._draws: list[float] = []

    @property
    def draw(self) -> float:
        """The random number of the next token."""
        if self.sampling.temperature == 0:
            return 0.0
        if len(self.tokens) >= len(self._draws):
            # as many as are needed soon: more begin with the same numbers
            more = min(max(FIRST_DRAWS, 2 * len(self._draws)), self.limit)
            self._draws = row_draws(self.sampling.seed, self._seed, more)
        return self._draws[len(self.tokens)]

    def add(self, token: int) -> Piece:
        """Take the next token; the piece carries the completion where it ends the row."""
        reason = "eos" if token in self._ends else None
        if reason is None:
            self.tokens.append(token)
            self._text.add(token)
            if len(self.tokens) == self.limit:
                reason = "length"
        return self.end(reason) if reason else self._next()

    def end(self, reason: str) -> Piece:
        """No token follows; what was held back is decided."""
        self._text.end()
        return self._next("stop" if self._text.stopped else reason)

    def fail(self) -> Piece:
        """End a row that could not take a token, without deciding what was held back."""
        done = Completion(self._text.text, tuple(self.tokens), "error", len(self.prompt))
        return Piece(self.index, "", done)

    def _next(self, reason: str | None = None) -> Piece:
        reason = "stop" if self._text.stopped else reason
        text = self._text.take(final=reason is not None)
        if reason is None:
            return Piece(self.index, text)
        done = Completion(self._text.text, tuple(self.tokens), reason, len(self.prompt))
        return Piece(self.index, text, done)
