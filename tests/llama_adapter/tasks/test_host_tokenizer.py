"""A host's tokenizer is its folder's own, or none."""

from pathlib import Path

import pytest

from llama_adapter.tasks.host_tokenizer import load_tokenizer
from tests.llama_adapter.tasks.text_hosts import host, roberta_tokenizer


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent must be a folder that transformers"):
        load_tokenizer(tmp_path / "absent")
    host(roberta_tokenizer()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no tokenizer: none of tokenizer.json, "):
        load_tokenizer(tmp_path, words=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no tokenizer that can be read \("):
        load_tokenizer(tmp_path, words=True)


def test_words_one_by_one_are_those_of_a_text(tmp_path: Path) -> None:
    """RoBERTa's folders say nothing of a space before the first word, which words need."""
    tokenizer = roberta_tokenizer(add_prefix_space=False)
    tokenizer.save_pretrained(tmp_path)
    plain, split = (load_tokenizer(tmp_path, words=words) for words in (False, True))
    text = "Paris in 1889"
    assert plain(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert split(text.split(), is_split_into_words=True)["input_ids"] == split(text)["input_ids"]
    assert split(text)["input_ids"] == plain(f" {text}")["input_ids"]
