"""A row of a batch: how it ends, and what is held back. test_generation.py has the loop's tests."""

import pytest

from llama_adapter.completion import Row
from llama_adapter.sampling import SamplingConfig
from llama_adapter.tokenizer import Tokenizer


@pytest.mark.parametrize("reason", ["cancelled", "error"])
def test_a_row_ended_from_outside_decides_what_it_held_back(
    tiny_tokenizer: Tokenizer, reason: str
) -> None:
    sampling = SamplingConfig(stop=("lights out",))
    row = Row(7, 0, "green", tiny_tokenizer, sampling, 160)
    tokens = tiny_tokenizer.encode("light")
    shown = "".join(row.add(token).text for token in tokens)
    assert shown == " "
    last = row.end(reason)
    assert last.row == 7
    assert last.completion is not None
    assert (last.completion.text, last.completion.finish_reason) == (" light", reason)
    assert last.completion.tokens == tuple(tokens)
    assert shown + last.text == " light"


def test_the_limit_is_what_the_context_leaves(tiny_tokenizer: Tokenizer) -> None:
    row = Row(0, 0, "green", tiny_tokenizer, SamplingConfig(max_new_tokens=50), 10)
    assert row.limit == 10 - len(row.prompt)
