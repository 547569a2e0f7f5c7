"""Does text survive every kind of tokenizer, alone and streamed, and is a wrong file named?"""

import base64
import json
import random
import sys
from io import BytesIO
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import nn

from llama_adapter.adapter import Adapter
from llama_adapter.completion import REPLACEMENT, Text
from llama_adapter.config import AdapterConfig, LlamaConfig
from llama_adapter.generation import generate, stream
from llama_adapter.model import Llama
from llama_adapter.sampling import SamplingConfig
from llama_adapter.tokenizer import LLAMA3_WORDS, Tokenizer, find_tokenizer

KINDS = ("sentencepiece", "tiktoken", "llama 3 json", "llama 2 json")
SENTENCE = """seven birds follow the quiet river and in the morning the first answer to the second
question is a paper window of stone Grüße 東京 2026 it's we'll"""
WORDS = SENTENCE.split()


def trained(size: int) -> list[bytes]:
    """A byte-level vocabulary in the order of its ranks: bytes, then pairs of frequent words."""
    pieces = [bytes([byte]) for byte in range(256)]
    for word in WORDS:
        data = (" " + word).encode()
        pieces += [data[:end] for end in range(2, len(data) + 1) if data[:end] not in pieces]
    return pieces[:size]


def write_tiktoken(folder: Path) -> Path:
    """LLaMA 3's tokenizer.model in small."""
    path = folder / "tokenizer.model"
    lines = [base64.b64encode(piece) + b" %d" % i for i, piece in enumerate(trained(330))]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def write_json(folder: Path) -> Path:
    """LLaMA 3's tokenizer.json in small, trained and written by the tokenizers library."""
    model = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    marks = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
    model.add_special_tokens(list(marks))
    model.enable_truncation(4)
    model.enable_padding(length=9)
    model.save(str(folder / "tokenizer.json"))
    named = {"bos_token": marks[0], "eos_token": {"content": marks[2], "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    eos = [model.token_to_id(mark) for mark in marks[1:]]
    generation = {"bos_token_id": 0, "eos_token_id": eos}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder / "tokenizer.json"


@pytest.fixture(params=KINDS)
def any_path(request: pytest.FixtureRequest, tiny_tokenizer_path: Path, tmp_path: Path) -> Path:
    """A tokenizer file of each kind."""
    if request.param == "sentencepiece":
        return tiny_tokenizer_path
    if request.param == "tiktoken":
        pytest.importorskip("tiktoken")
        return write_tiktoken(tmp_path)
    if request.param == "llama 3 json":
        return write_json(tmp_path)
    # transformers' own conversion of the sentencepiece model
    theirs = transformers.LlamaTokenizerFast.from_pretrained(str(tiny_tokenizer_path.parent))
    theirs.save_pretrained(str(tmp_path))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize(
    "text",
    [
        "seven birds follow the quiet river",
        "",
        "two  spaces, and a tail ",
        "lines\n\nof\ttext 20260",
        "Grüße, 東京, 🦙 we'll",
        "a </s> and a <s>, <|begin_of_text|> <|end_of_text|><|eot_id|><|mark_0|> <0x41> in",
    ],
)
def test_text_survives_every_kind(text: str, any_path: Path) -> None:
    tokenizer = Tokenizer(any_path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, *tokenizer.end_ids} & set(ids)
    marked = tokenizer.encode(text, bos=True, eos=True)
    assert marked == [tokenizer.bos_id, *ids, tokenizer.eos_id]
    assert tokenizer.decode(marked) == text


def test_each_id_of_every_kind_has_a_text(any_path: Path) -> None:
    tokenizer = Tokenizer(any_path)
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    assert texts[tokenizer.bos_id] == texts[tokenizer.eos_id] == ""
    with pytest.raises(ValueError, match=r"token ids must be in 0\.\."):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(ValueError, match="text must be UTF-8"):
        tokenizer.encode("half \ud800")


def test_streamed_text_is_the_text_for_every_kind(any_path: Path) -> None:
    """Characters of several tokens, and runs of them, are shown whole and once."""
    tokenizer = Tokenizer(any_path)
    rng = random.Random(3)
    for _ in range(60):
        words = rng.choices([*WORDS, "🦙🦙", "東京都庁", "  ", "ß", "\n"], k=rng.randint(2, 12))
        text = "".join(word + rng.choice(("", " ")) for word in words)
        ids = tokenizer.encode("the " + text)
        split = rng.randrange(1, len(ids))
        while REPLACEMENT in tokenizer.decode(ids[:split]):
            split -= 1
        shown = Text(tokenizer, ids[:split], ())
        pieces = []
        for token in ids[split:]:
            shown.add(token)
            pieces.append(shown.take(final=False))
        shown.end()
        pieces.append(shown.take(final=True))
        assert "".join(pieces) == shown.text
        assert tokenizer.decode(ids[:split]) + shown.text == tokenizer.decode(ids)
        assert REPLACEMENT not in shown.text


@torch.no_grad()
def test_generation_and_streams_run_with_every_kind(any_path: Path) -> None:
    tokenizer = Tokenizer(any_path)
    model = Llama(LlamaConfig(32, 2, 4, tokenizer.vocab_size, n_kv_heads=2, multiple_of=8))
    model.requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
    adapter = Adapter(AdapterConfig(prompt_length=4), model.config, generator=generator)
    adapter.gates.normal_(std=1.5, generator=generator)
    prompts, texts = model.project(adapter), ["the quiet river", "東京 🦙 in the morning"]
    sampling = SamplingConfig(max_new_tokens=30, temperature=1.0, top_p=1.0, seed=5)
    done = generate(model, tokenizer, texts, sampling, prompts=prompts)
    pieces = list(stream(model, tokenizer, texts, sampling, prompts=prompts))
    for row, completion in enumerate(done):
        assert "".join(piece.text for piece in pieces if piece.row == row) == completion.text
        assert len(completion.tokens) > 3
        assert completion.prompt_tokens == len(tokenizer.encode(texts[row], bos=True))


def test_every_end_of_an_answer_ends_it(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_json(tmp_path))
    assert len(tokenizer.end_ids) == 2
    assert tokenizer.eos_id == tokenizer.vocab_size - 1
    model = Llama(LlamaConfig(16, 1, 2, tokenizer.vocab_size, multiple_of=8)).requires_grad_(False)
    for end in tokenizer.end_ids:
        # hidden states of unit size meet a large row of the output
        model.output.weight.zero_()[end] = 0
        model.tok_embeddings.weight.fill_(1)
        model.output.weight[end] = 5 * model.norm.weight
        model.layers[0].feed_forward.w2.weight.zero_()
        model.layers[0].attention.wo.weight.zero_()
        (done,) = generate(model, tokenizer, ["the river"], SamplingConfig(temperature=0))
        assert (done.finish_reason, done.tokens) == ("eos", ())


def test_sentencepiece_and_its_json_give_the_same_ids(
    tiny_tokenizer_path: Path, tmp_path: Path
) -> None:
    theirs = transformers.LlamaTokenizerFast.from_pretrained(str(tiny_tokenizer_path.parent))
    theirs.save_pretrained(str(tmp_path))
    plain, converted = Tokenizer(tiny_tokenizer_path), find_tokenizer(tmp_path)
    assert (converted.bos_id, converted.eos_id, converted.vocab_size) == (1, 2, 353)
    for text in ("seven birds follow", "Grüße, 東京, 🦙", "lines\n\nof\ttext 20260"):
        assert converted.encode(text) == plain.encode(text)
    # the model's own file comes first
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer_path.read_bytes())
    assert find_tokenizer(tmp_path).path.name == "tokenizer.model"


def test_a_llama_3_vocabulary_has_its_marks_behind_it(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    tokenizer = Tokenizer(write_tiktoken(tmp_path))
    ranks = {piece: i for i, piece in enumerate(trained(330))}
    theirs = tiktoken.Encoding(
        "tiny", pat_str=LLAMA3_WORDS, mergeable_ranks=ranks, special_tokens={}
    )
    count = len(ranks)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (count, count + 1)
    assert tokenizer.end_ids == {count + 1, count + 8, count + 9}
    assert tokenizer.vocab_size == count + 256
    assert tokenizer.encode("seven Grüße 12345") == theirs.encode_ordinary("seven Grüße 12345")
    # tiktoken's own call panics on it
    blanks = " " * 200_000 + "x"
    assert tokenizer.decode(tokenizer.encode(blanks)) == blanks


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"IQ== 40", r"line 34 must be a new base64 token and the rank 33, got 'IQ== 40'"),
        (b"IQ== 33 1", r"line 34 must be a new base64 token"),
        (b"I 33", r"line 34 must be a new base64 token"),
        (b"IA== 33", r"line 34 must be a new base64 token"),
        (b"ISE= 33", r"must have a token for each byte, lacks 33"),
    ],
)
def test_a_damaged_vocabulary_is_named(line: bytes, problem: str, tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    path = write_tiktoken(tmp_path)
    lines = path.read_bytes().splitlines()
    lines[33] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=problem):
        Tokenizer(path)


@pytest.mark.parametrize("name", ["tiktoken", "tokenizers"])
def test_a_missing_library_is_named_with_its_remedy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = (write_tiktoken if name == "tiktoken" else write_json)(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)
    message = rf"needs {name} to be read: pip install 'llama-adapter-kernels\[tokenizers\]'"
    with pytest.raises(ValueError, match=message):
        Tokenizer(path)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1]", b'{"model": 1, "added_tokens": []}', b"[" * 9999]
)
def test_a_damaged_json_is_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged, or no tokenizer\.json") as e:
        Tokenizer(path)
    assert "\n" not in str(e.value)


def test_a_json_without_marks_is_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="must have a mark for the beginning of a text"):
        Tokenizer(path)


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
