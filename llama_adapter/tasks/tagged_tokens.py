"""Sentences as a host of transformers takes them: the tokens of all words, the first of each word.

Where a sentence has a predicate, a separator and the predicate's word stand behind the words, and
are nobody's first token.
"""

from dataclasses import dataclass
from typing import Any

from llama_adapter.tasks.conll_files import Sentence

# of tokens that have no label of their own
NO_LABEL = -100


@dataclass(frozen=True)
class Tokenised:
    """A sentence's tokens.

    Attributes:
        inputs: "input_ids" and what else the host takes one of per token.
        first_tokens: for every word its first token's place, None where it has none.
    """

    inputs: dict[str, list[int]]
    first_tokens: list[int | None]


@dataclass(frozen=True)
class Tagged:
    """How sentences become tokens.

    Words that do not fit are left out from the end, whole; the predicate behind them stays.

    Attributes:
        tokenizer: one of transformers' fast ones; a byte-level one made with add_prefix_space.
        max_length: tokens of a sentence, special ones and the predicate's included.
        separator: the word before the predicate's; None: the tokenizer's separating token. P-tuning
            v2's code has "[SEP]", which is no special token of RoBERTa's.
    """

    tokenizer: Any
    max_length: int = 128
    separator: str | None = None

    def __post_init__(self) -> None:
        """Check that the tokenizer takes words.

        Raises:
            ValueError: words one by one are other tokens than in a text, or max_length is out of
                range.
        """
        try:
            apart = self.tokenizer(["a", "a"], is_split_into_words=True)["input_ids"]
        except AssertionError:
            # how some of transformers' classes say it themselves
            apart = None
        if apart != self.tokenizer("a a")["input_ids"]:
            raise ValueError(
                "tokenizer must be made with add_prefix_space=True, to take words one by one"
            )
        special = self.tokenizer.num_special_tokens_to_add(pair=False)
        if not special < self.max_length <= self.tokenizer.model_max_length:
            raise ValueError(
                f"max_length must be more than the {special} special tokens and at most "
                f"{self.tokenizer.model_max_length}, as the tokenizer says of its model, "
                f"got {self.max_length}"
            )

    def before_predicate(self) -> str:
        """The word that parts a sentence from its predicate.

        Raises:
            ValueError: none is given and the tokenizer has none.
        """
        if self.separator is not None:
            return self.separator
        if self.tokenizer.sep_token is None:
            raise ValueError("separator must be given: the tokenizer has no separating token")
        return self.tokenizer.sep_token

    def tokenised(self, sentence: Sentence) -> Tokenised:
        """A sentence's tokens, at most max_length of them."""
        tail: list[str] = []
        if sentence.predicate is not None:
            tail = [self.before_predicate(), sentence.words[sentence.predicate]]
        count = len(sentence.words)
        encoding = self._encoded([*sentence.words, *tail])
        if len(encoding.ids) > self.max_length:
            count = self._fitting(encoding, len(sentence.words))
            encoding = self._encoded([*sentence.words[:count], *tail])
        first_tokens: list[int | None] = [None] * len(sentence.words)
        for token in reversed(range(min(len(encoding.ids), self.max_length))):
            word = encoding.word_ids[token]
            if word is not None and word < count:
                first_tokens[word] = token
        inputs = {"input_ids": encoding.ids[: self.max_length]}
        if "token_type_ids" in self.tokenizer.model_input_names:
            inputs["token_type_ids"] = encoding.type_ids[: self.max_length]
        return Tokenised(inputs, first_tokens)

    def _encoded(self, words: list[str]) -> Any:
        return self.tokenizer(words, is_split_into_words=True).encodings[0]

    def _fitting(self, encoding: Any, words: int) -> int:
        """How many of a sentence's first words leave room for all else that is encoded."""
        own = [word for word in encoding.word_ids if word is not None and word < words]
        over = len(encoding.ids) - self.max_length
        return own[max(len(own) - over, 0)] if own else 0
