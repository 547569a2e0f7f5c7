"""Which small model, tokenizer and adapter do the tests share?

Everything is made from fixed seeds in well under a second. The weights are spread wide enough for
the logits to differ clearly from token to token, which the N(0, 0.02) of a fresh model does not do.
"""

import json
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import sentencepiece
import torch
from torch import nn

from adapter_kernels import load_native
from llama_adapter.adapter import Adapter
from llama_adapter.config import AdapterConfig, LlamaConfig
from llama_adapter.model import Llama
from llama_adapter.tokenizer import Tokenizer

CORPUS = """Below is an instruction that describes a task, paired with an input that provides
further context. Write a response that appropriately completes the request. Under a green light
seven birds follow the quiet river, and in the morning the first answer to the second question is a
paper window of stone, third in reverse order."""
VOCAB_SIZE = 353


@pytest.fixture(scope="session", autouse=True)
def compiled_operations() -> None:
    """The first engine of a process loads them for good: here no test depends on which it is."""
    load_native()


@pytest.fixture(scope="session")
def tiny_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model in LLaMA's manner: BPE, byte fallback, identity normalisation."""
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(7)
    words = CORPUS.split()
    lines = [" ".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(400)]
    (folder / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCAB_SIZE,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_tokenizer_path: Path) -> Tokenizer:
    """The tokenizer at `tiny_tokenizer_path`."""
    return Tokenizer(tiny_tokenizer_path)


@pytest.fixture(scope="session")
def tiny_config() -> LlamaConfig:
    """Four layers of width 48, grouped-query, heads of 8, a context of 160 tokens."""
    return LlamaConfig(
        dim=48,
        n_layers=4,
        n_heads=6,
        n_kv_heads=2,
        vocab_size=VOCAB_SIZE,
        multiple_of=8,
        max_seq_len=160,
    )


@pytest.fixture
def tiny_model(tiny_config: LlamaConfig) -> Llama:
    """A random frozen model of `tiny_config`, the same in every test."""
    model = Llama(tiny_config)
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            # unit variance through each projection: wide logits, as a trained model has
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    nn.init.normal_(model.tok_embeddings.weight, generator=generator)
    return model.requires_grad_(False).eval()


@pytest.fixture
def even_model(tiny_model: Llama) -> Llama:
    """`tiny_model` with 384 words: every weight is whole blocks of 64 numbers."""
    model = Llama(replace(tiny_model.config, vocab_size=384))
    state, generator = tiny_model.state_dict(), torch.Generator().manual_seed(17)
    for name in ("tok_embeddings.weight", "output.weight"):
        more = torch.randn(384 - VOCAB_SIZE, tiny_model.config.dim, generator=generator)
        state[name] = torch.cat([state[name], more * state[name].std()])
    model.load_state_dict(state)
    return model.requires_grad_(False).eval()


@pytest.fixture
def tiny_adapter(tiny_config: LlamaConfig) -> Adapter:
    """An adapter of prompt length 5 on two layers with random gates, some of |gate| > 1."""
    generator = torch.Generator().manual_seed(13)
    config = AdapterConfig(prompt_length=5)
    adapter = Adapter(config, tiny_config, generator=generator)
    with torch.no_grad():
        adapter.gates.normal_(std=1.5, generator=generator)
    return adapter


@pytest.fixture
def tiny_base(tmp_path: Path, tiny_model: Llama, tiny_tokenizer_path: Path) -> Path:
    """The tiny model as a Meta folder."""
    return save_base(tmp_path / "tiny", tiny_model, tiny_tokenizer_path)


def save_base(folder: Path, model: Llama, tokenizer: Path, max_seq_len: int | None = None) -> Path:
    """A model and its tokenizer as a Meta folder, with a context of its own if one is given."""
    folder.mkdir()
    shutil.copy(tokenizer, folder / "tokenizer.model")
    torch.save(model.state_dict(), folder / "consolidated.00.pth")
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps")
    shape = {name: value for name, value in asdict(model.config).items() if name in names}
    shape["max_seq_len"] = max_seq_len or model.config.max_seq_len
    (folder / "params.json").write_text(json.dumps(shape))
    return folder
