"""From records to examples: token ids, and labels on the response only.

A position without a label holds IGNORE_INDEX, which is no token id, so that no word of the
vocabulary can be mistaken for one.
"""

from dataclasses import dataclass

from llama_adapter.data.records import Record
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
        image: path of the picture that it is about, as the file has it; None without one.
    """

    index: int
    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    image: str | None = None

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
    """Tokenise one record in the papers' template; arguments and errors as `encode_pair`."""
    prompt = prompt_text(record.instruction, record.input)
    return encode_pair(record.index, prompt, record.output, tokenizer, max_length, record.image)


def encode_pair(
    index: int,
    prompt: str,
    answer: str,
    tokenizer: Tokenizer,
    max_length: int,
    image: str | None = None,
) -> Example:
    """Tokenise a text and how it goes on, with labels on what goes on and EOS only.

    Prompt and prompt + answer are tokenised each as a whole, as in the papers' recipe: the labels
    start behind as many tokens as the prompt alone has. Both are cut at max_length from the right.

    Args:
        index: of the record in its file.
        prompt: the whole text before the answer.
        answer: what follows.
        tokenizer: the base model's.
        max_length: tokens kept, BOS and EOS included.
        image: path of the picture that it is about.

    Returns:
        The example, which has no label at all where the prompt fills max_length.

    Raises:
        ValueError: max_length is less than 2.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    masked = len(tokenizer.encode(prompt, bos=True))
    tokens = tokenizer.encode(prompt + answer, bos=True, eos=True)
    labels = [IGNORE_INDEX] * min(masked, len(tokens)) + tokens[masked:]
    return Example(index, tuple(tokens[:max_length]), tuple(labels[:max_length]), image)
