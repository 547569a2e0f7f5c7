"""Conversations of several turns: their text, and examples with labels on every answer.

The form is that of LLaMA-Adapter V2's chat model, FastChat's first: a system sentence, then turns
that each end with "###".
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llama_adapter.data.examples import IGNORE_INDEX, Example
from llama_adapter.tokenizer import Tokenizer

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
# ends the system sentence and every turn; whoever generates stops there
SEPARATOR = "###"


@dataclass(frozen=True)
class Turn:
    """What was asked and what was answered; an answer of None is still to be given."""

    question: str
    answer: str | None


def chat_text(turns: Sequence[Turn], system: str = SYSTEM) -> str:
    """Text of a conversation; behind a last turn without an answer the model continues.

    Args:
        turns: at least one, of which only the last may lack an answer.
        system: the sentence before them.

    Raises:
        ValueError: there is no turn, or an answer is missing before the last.
    """
    return "".join(text for text, _ in _pieces(turns, system))


def encode_chat(
    index: int,
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    max_length: int,
    system: str = SYSTEM,
    image: str | None = None,
) -> Example:
    """Tokenise a conversation, with labels on the answers and on the separators that end them.

    The text is tokenised as a whole, and so is each of its beginnings: an answer's labels start
    behind as many tokens as all before it have. The end of the text gets no EOS: a turn may follow.

    Args:
        index: of the record in its file.
        turns: all answered.
        tokenizer: the base model's.
        max_length: tokens kept, BOS included, from the left.
        system: the sentence before the turns.
        image: path of the picture that they are about.

    Returns:
        The example, which has no label at all where the first question fills max_length.

    Raises:
        ValueError: max_length is below 2, there is no turn, or an answer is missing.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    if turns and turns[-1].answer is None:
        raise ValueError("turns must all be answered to be trained on, the last one is not")
    pieces = _pieces(turns, system)
    tokens = tokenizer.encode("".join(text for text, _ in pieces), bos=True)
    labels = [IGNORE_INDEX] * len(tokens)
    text, start = "", 0
    for piece, answered in pieces:
        text += piece
        # the last piece ends where the whole does
        end = min(len(tokenizer.encode(text, bos=True)), len(tokens))
        if answered:
            labels[start:end] = tokens[start:end]
        start = end
    return Example(index, tuple(tokens[:max_length]), tuple(labels[:max_length]), image)


def _pieces(turns: Sequence[Turn], system: str) -> list[tuple[str, bool]]:
    """The text in pieces, and whether the model is to say each."""
    if not turns:
        raise ValueError("turns must hold at least one, got none")
    pieces, text = [], f"{system}{SEPARATOR}"
    for number, turn in enumerate(turns):
        text += f"Human: {turn.question}{SEPARATOR}Assistant:"
        pieces.append((text, False))
        if turn.answer is not None:
            pieces.append((f" {turn.answer}{SEPARATOR}", True))
        elif number < len(turns) - 1:
            raise ValueError(f"turns[{number}] has no answer, and is not the last")
        text = ""
    return pieces
