"""Labels sit on the response alone, and no token id stands for "no label"."""

import json
from pathlib import Path

import pytest

from llama_adapter.data.examples import (
    encode_record,
    encode_records,
    load_dataset,
)
from llama_adapter.data.records import Record
from llama_adapter.data.template import prompt_text
from llama_adapter.tokenizer import Tokenizer

RECORD = Record(4, "reverse order", "", "river stone")


def write(path: Path, items: list[dict[str, str]]) -> Path:
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


def items(count: int, output: str = "stone") -> list[dict[str, str]]:
    return [{"instruction": f"answer {i}", "input": "", "output": output} for i in range(count)]


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


def test_a_record_whose_prompt_fills_the_length_is_reported(tiny_tokenizer: Tokenizer) -> None:
    prompt = len(tiny_tokenizer.encode(prompt_text("reverse order"), bos=True))
    short = Record(9, "order", "", "stone")
    examples, problems = encode_records([RECORD, short], tiny_tokenizer, prompt)
    assert [example.index for example in examples] == [9]
    assert [str(problem) for problem in problems] == [
        f"record 4: its prompt leaves no label within {prompt} tokens (max_length, context)"
    ]
    assert encode_records([RECORD], tiny_tokenizer, prompt + 1)[0][0].n_labels == 1


def test_max_length_has_a_lower_limit(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        encode_record(RECORD, tiny_tokenizer, 1)


def test_every_record_is_trained_on_held_out_or_reported(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    data = items(30)
    data[3]["output"] = " "
    data[11]["instruction"] = "stone river " * 60
    path = write(tmp_path / "a.json", data)
    dataset = load_dataset(path, tiny_tokenizer, 130, val_fraction=0.25, seed=5)
    train = {example.index for example in dataset.train}
    held_out = {example.index for example in dataset.held_out}
    assert train | held_out == set(range(30)) - {3, 11}
    assert not train & held_out
    assert len(held_out) == 7
    assert dataset.warnings == [
        f"{path}: 2 of 30 records cannot be used (numbered from 0): record 3: output is empty; "
        "record 11: its prompt leaves no label within 130 tokens (max_length, context)"
    ]
    assert dataset.skipped_lines()[1] == {
        "file": str(path),
        "record": 11,
        "reason": "its prompt leaves no label within 130 tokens (max_length, context)",
    }


def test_val_size_counts_records_and_zero_holds_none_out(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    path = write(tmp_path / "a.json", items(20))
    sizes = [
        len(load_dataset(path, tiny_tokenizer, 130, val_size=size, val_fraction=0.5).held_out)
        for size in (0, 1, 13)
    ]
    assert sizes == [0, 1, 13]


def test_a_separate_held_out_file_is_never_trained_on(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    path = write(tmp_path / "a.json", items(12))
    val_path = write(tmp_path / "val.json", [*items(14)[9:], {"instruction": "", "output": "x"}])
    dataset = load_dataset(path, tiny_tokenizer, 130, val_data=val_path, val_fraction=0.5)
    assert [example.index for example in dataset.train] == list(range(9))
    assert [example.index for example in dataset.held_out] == [0, 1, 2, 3, 4]
    assert dataset.warnings == [
        f"{path}: 3 of 12 records cannot be used (numbered from 0): "
        "record 9: asks the same as held-out record 0; "
        "record 10: asks the same as held-out record 1; "
        "record 11: asks the same as held-out record 2",
        f"{val_path}: 1 of 6 records cannot be used (numbered from 0): "
        "record 5: instruction is empty",
    ]


def test_strict_refuses_and_lists_the_first_few(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    data = items(9)
    for index in (0, 2, 4, 6):
        data[index]["output"] = ""
    path = write(tmp_path / "a.json", data)
    with pytest.raises(ValueError, match="cannot be used") as caught:
        load_dataset(path, tiny_tokenizer, 130, strict=True)
    assert str(caught.value) == (
        f"{path}: 4 of 9 records cannot be used (numbered from 0): record 0: output is empty; "
        "record 2: output is empty; record 4: output is empty; and 1 more"
    )
    clean = write(tmp_path / "b.json", items(9))
    assert len(load_dataset(clean, tiny_tokenizer, 130, strict=True).train) == 9


def test_a_file_without_a_single_label_is_refused_by_name(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    path = write(tmp_path / "a.json", items(2))
    reason = "its prompt leaves no label within 20 tokens (max_length, context)"
    with pytest.raises(ValueError, match="cannot be used") as caught:
        load_dataset(path, tiny_tokenizer, 20, val_size=1)
    assert str(caught.value) == (
        f"{path}: 2 of 2 records cannot be used (numbered from 0): "
        f"record 0: {reason}; record 1: {reason}"
    )


def test_the_digest_changes_with_the_file(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "a.json", items(3))
    before = load_dataset(path, tiny_tokenizer, 130).digests
    write(path, items(3, "river"))
    after = load_dataset(path, tiny_tokenizer, 130).digests
    assert before.keys() == after.keys() == {str(path)}
    assert before != after
