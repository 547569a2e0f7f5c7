"""Every record is trained on, held out or named."""

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest

from llama_adapter import data
from llama_adapter.data.dataset import load_dataset
from llama_adapter.data.template import prompt_text
from llama_adapter.tokenizer import Tokenizer


def write(path: Path, items: list[dict[str, str]]) -> Path:
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


def items(count: int, output: str = "stone") -> list[dict[str, str]]:
    return [{"instruction": f"answer {i}", "input": "", "output": output} for i in range(count)]


def test_a_record_whose_prompt_fills_the_length_is_reported(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    prompt = len(tiny_tokenizer.encode(prompt_text("reverse order"), bos=True))
    data = [{"instruction": "reverse order", "output": "x"}, {"instruction": "go", "output": "y"}]
    path = write(tmp_path / "a.json", data)
    dataset = load_dataset(path, tiny_tokenizer, prompt)
    assert [example.index for example in dataset.train] == [1]
    assert [str(problem) for problem in dataset.problems[str(path)]] == [
        f"record 0: its prompt leaves no label within {prompt} tokens (max_length, context)"
    ]
    longer = load_dataset(path, tiny_tokenizer, prompt + 1).train
    assert longer[0].n_labels == 1


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


def test_pictures_are_looked_at_before_a_record_is_used(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    data, asked = items(12), []
    for index, name in {1: "a.png", 3: "b.png", 4: "a.png", 7: "c.png", 8: "d.png"}.items():
        data[index]["image"] = name
    data[8]["output"] = " "
    path = write(tmp_path / "a.json", data)
    val_path = write(tmp_path / "val.json", [*items(20)[15:], items(1)[0] | {"image": "c.png"}])
    why = {"a.png": "a.png: no such file", "c.png": "c.png: no image that can be read"}

    def unusable(images: Sequence[str]) -> dict[str, str]:
        asked.append(list(images))
        return {name: reason for name, reason in why.items() if name in images}

    dataset = load_dataset(path, tiny_tokenizer, 130, val_size=2, unusable=unusable)
    # one that is not used anyway is not looked at
    assert asked == [["a.png", "b.png", "c.png"]]
    assert dataset.skipped_lines() == [
        {"file": str(path), "record": index, "reason": reason}
        for index, reason in [
            (1, why["a.png"]), (4, why["a.png"]), (7, why["c.png"]), (8, "output is empty")
        ]
    ]  # fmt: skip
    used = [*dataset.train, *dataset.held_out]
    assert sorted(example.index for example in used) == [0, 2, 3, 5, 6, 9, 10, 11]
    assert [e.index for e in used if e.image == "b.png"] == [3]
    flags = [example.image is not None for example in dataset.train]
    assert dataset.with_image.tolist() == flags
    with pytest.raises(ValueError, match=r"4 of 12 records cannot be used .* record 1: a\.png: no"):
        load_dataset(path, tiny_tokenizer, 130, strict=True, unusable=unusable)
    # a held-out file's too; its question about a picture is not the one without
    both = load_dataset(path, tiny_tokenizer, 130, val_data=val_path, unusable=unusable)
    assert [problem.index for problem in both.problems[str(val_path)]] == [5]
    assert 0 in [example.index for example in both.train]


def test_pictures_are_refused_where_none_are_taken(
    tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    data = items(5)
    data[2]["image"] = "a.png"
    path = write(tmp_path / "a.json", data)
    with pytest.raises(ValueError, match=r"has an image") as caught:
        load_dataset(path, tiny_tokenizer, 130)
    assert str(caught.value) == (
        f"{path}: record 2, counted from 0, has an image: give --images, the folder that its path "
        "starts from, and --vision-model, an encoder's"
    )


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


def test_memory_does_not_grow_with_the_records(
    tmp_path: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some tens of bytes each, and not the 2,400 of an example's tokens and labels as objects."""
    monkeypatch.setattr(data.items, "CHUNK", 1 << 16)
    peaks = []
    for count in (1_000, 5_000):
        path = write(tmp_path / f"{count}.json", items(count))
        tracemalloc.start()
        try:
            dataset = load_dataset(path, tiny_tokenizer, 160, val_size=100, token_cache=tmp_path)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert len(dataset.train) == count - 100
        assert len(dataset.train[-1].tokens) > 80
    assert peaks[1] - peaks[0] < 200 * 4_000
