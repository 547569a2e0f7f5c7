"""Labels sit on the response alone, and no token id stands for "no label"."""

import pytest

from llama_adapter.data.examples import encode_record
from llama_adapter.data.records import Record
from llama_adapter.data.template import prompt_text
from llama_adapter.tokenizer import Tokenizer

RECORD = Record(4, "reverse order", "", "river stone")


def test_labels_are_the_response_and_its_end_exactly(tiny_tokenizer: Tokenizer) -> None:
    example = encode_record(RECORD, tiny_tokenizer, 512)
    text = prompt_text("reverse order")
    prompt = [1, *tiny_tokenizer.encode(text)]
    # the response by hand: "river stone" behind the colon, then EOS
    response = [*tiny_tokenizer.encode(text + "river stone")[len(prompt) - 1 :], 2]
    assert tiny_tokenizer.decode(response[:-1]) == "river stone"
    assert example.tokens == (*prompt, *response)
    assert example.labels == (*[-100] * len(prompt), *response)
    assert example.n_labels == len(response) > 2
    assert example.index == 4


def test_an_output_that_merges_with_the_colon_is_cut_where_the_prompt_alone_ends() -> None:
    class Merging(Tokenizer):
        """Every character a token, but ":)" one of its own."""

        def __init__(self) -> None:
            self.bos_id, self.eos_id = 1, 2

        def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
            ids = [ord(character) for character in text.replace(":)", "\u2022")]
            return [1] * bos + ids + [2] * eos

    example = encode_record(Record(0, "x", "", ")!"), Merging(), 512)
    length = len(prompt_text("x")) + 1
    assert example.tokens[length - 1] == ord("\u2022")
    assert example.labels == (*[-100] * length, ord("!"), 2)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_truncation_cuts_from_the_right(tiny_tokenizer: Tokenizer, kept: int) -> None:
    whole = encode_record(RECORD, tiny_tokenizer, 512)
    limit = len(whole.tokens) - whole.n_labels + kept
    cut = encode_record(RECORD, tiny_tokenizer, limit)
    assert cut.tokens == whole.tokens[:limit]
    assert cut.labels == whole.labels[:limit]
    assert cut.n_labels == kept


def test_max_length_has_a_lower_limit(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        encode_record(RECORD, tiny_tokenizer, 1)
