"""Does the one entry to base models open a folder, and say in one line what it cannot open?"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints import load_base
from llama_adapter.checkpoints.adapter_file import load_adapter, save_adapter
from llama_adapter.checkpoints.fingerprint import fingerprint
from llama_adapter.model import Llama

Write = Callable[..., Path]


def test_a_base_has_model_tokenizer_and_name(write_meta: Write, tiny_model: Llama) -> None:
    folder = write_meta(tiny_model)
    base = load_base(str(folder))
    assert base.name == folder.name
    assert base.tokenizer.vocab_size == base.model.config.vocab_size == 353
    assert torch.equal(base.model.output_weight, tiny_model.output_weight)
    assert load_base(folder, dtype=torch.bfloat16).model.output_weight.dtype == torch.bfloat16


@torch.no_grad()
def test_an_adapter_follows_its_base_through_files(
    write_meta: Write, tiny_model: Llama, tiny_adapter: Adapter, tmp_path: Path
) -> None:
    path = tmp_path / "adapter.safetensors"
    base = load_base(write_meta(tiny_model))
    save_adapter(path, tiny_adapter, fingerprint(base.model, base.name))
    sharded = load_base(write_meta(tiny_model, shards=2, embedding_dim=0))
    adapter = load_adapter(path, sharded.model, sharded.name)
    tokens = torch.tensor([base.tokenizer.encode("the first answer", bos=True)])
    expected = tiny_model(tokens, tiny_model.project(tiny_adapter))
    assert torch.equal(sharded.model(tokens, sharded.model.project(adapter)), expected)


def test_a_name_comes_from_the_folder_itself(
    write_meta: Write, tiny_model: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_meta(tiny_model)
    monkeypatch.chdir(folder)
    assert load_base(".").name == folder.name


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"base model folder .*absent does not exist"):
        load_base(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["empty", "other", "file"])
def test_a_folder_of_another_kind_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path
    if kind == "other":
        (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    if kind == "file":
        path = tmp_path / "consolidated.00.pth"
        path.touch()
    message = r"Meta's format \(consolidated.*Hugging Face's \(config\.json.*litgpt's \(lit_model"
    with pytest.raises(ValueError, match=message):
        load_base(path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused(write_meta: Write, tiny_model: Llama) -> None:
    with pytest.raises(ValueError, match=r"device cuda is not available: torch .* sees no GPU"):
        load_base(write_meta(tiny_model), device="cuda")
