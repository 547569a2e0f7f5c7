"""Does text survive the tokenizer, and is a file of another kind refused by name?"""

import base64
from io import BytesIO
from pathlib import Path

import pytest
import sentencepiece

from llama_adapter.tokenizer import Tokenizer


@pytest.mark.parametrize(
    "text",
    [
        "seven birds follow the quiet river",
        "",
        " two  spaces, and a tail ",
        "lines\n\nof\ttext 20260",
        "Grüße, 東京, 🦙",
        "a </s> and a <s> spelled out",
    ],
)
def test_text_survives_encoding(text: str, tiny_tokenizer: Tokenizer) -> None:
    ids = tiny_tokenizer.encode(text)
    assert tiny_tokenizer.decode(ids) == text
    assert not {0, tiny_tokenizer.bos_id, tiny_tokenizer.eos_id} & set(ids)


def test_marks_are_added_where_asked_for(tiny_tokenizer: Tokenizer) -> None:
    plain = tiny_tokenizer.encode("the river")
    assert (tiny_tokenizer.bos_id, tiny_tokenizer.eos_id) == (1, 2)
    assert tiny_tokenizer.encode("the river", bos=True) == [1, *plain]
    assert tiny_tokenizer.encode("the river", eos=True) == [*plain, 2]
    both = tiny_tokenizer.encode("the river", bos=True, eos=True)
    assert both == [1, *plain, 2]
    assert tiny_tokenizer.decode(both) == "the river"


def test_vocabulary_size_is_the_models(tiny_tokenizer: Tokenizer) -> None:
    assert tiny_tokenizer.vocab_size == 353
    assert isinstance(tiny_tokenizer.decode([352]), str)


@pytest.mark.parametrize("wrong", [353, -1])
def test_ids_outside_the_vocabulary_are_refused(wrong: int, tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=rf"token ids must be in 0\.\.352, got {wrong}"):
        tiny_tokenizer.decode([5, wrong])


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer file .*absent\.model does not exist"):
        Tokenizer(tmp_path / "absent.model")


@pytest.mark.parametrize("data", [b"", b"hello", b"\x80\x02}q\x00.", b'{"model": 1}'])
def test_files_of_another_kind_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a sentencepiece model, or is"):
        Tokenizer(path)


def test_llama_3_vocabulary_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    lines = [base64.b64encode(bytes([i])) + b" %d" % i for i in range(64)]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=r"is a tiktoken vocabulary \(LLaMA 3\)"):
        Tokenizer(path)


@pytest.mark.parametrize(("mark", "name"), [("bos_id", "beginning"), ("eos_id", "end")])
def test_models_without_a_mark_are_refused(mark: str, name: str, tmp_path: Path) -> None:
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["seven birds follow the river"] * 9),
        model_writer=model,
        vocab_size=30,
        model_type="char",
        hard_vocab_limit=False,
        minloglevel=2,
        **{mark: -1},
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(ValueError, match=f"must have a mark for the {name} of a text"):
        Tokenizer(path)
