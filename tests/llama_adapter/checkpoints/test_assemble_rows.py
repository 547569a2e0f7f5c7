"""A process that keeps some rows of every tensor reads those alone, and they are the whole's."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama_adapter.checkpoints import hugging_face, litgpt, load_base, meta
from llama_adapter.checkpoints.assemble import copy_rows, halves_to_pairs
from llama_adapter.config import LlamaConfig
from llama_adapter.model import Llama
from llama_adapter.sharding import own_rows
from llama_adapter.world import World
from tests.llama_adapter.checkpoints.test_load_base_formats import (
    LITGPT,
    write_hugging_face,
)

Write = Callable[[str, Tensor, int], None]


class Reads:
    """A tensor that tells which of its rows are read."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.rows = tensor, set[int]()

    def __getitem__(self, rows: slice, /) -> Tensor:
        self.rows |= set(range(len(self.tensor))[rows])
        return self.tensor[rows]


@pytest.mark.parametrize("start", [0, 3, 8, 13, 24])
@pytest.mark.parametrize("count", [0, 1, 5, 8, 16])
def test_no_other_rows_are_read(start: int, count: int) -> None:
    whole = torch.randn(40, 3)
    for per_head in (None, 8):
        source, out = Reads(whole), torch.full((count, 3), torch.nan)
        copy_rows(source, out, start, per_head)
        pairs = whole.clone()
        if per_head is not None:
            halves_to_pairs(whole, pairs, 5)
        assert torch.equal(out, pairs[start : start + count])
        wanted = set(range(start, start + count))
        if per_head is not None:
            wanted = {8 * (row // 8) + i for row in wanted for i in range(8)}
        assert source.rows == wanted


def check_rows(
    module: Any, folder: Path, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a reader writes into each process's rows is what it reads whole."""
    whole = load_base(folder, dtype=dtype).model.state_dict()
    for size in (1, 2, 3, 7):
        parts: dict[str, list[Tensor]] = {name: [] for name in whole}
        for rank in range(size):
            world = World(rank, size)

            def assemble(
                config: LlamaConfig,
                write: Write,
                dtype: torch.dtype,
                device: object,
                given: World | None,
                world: World = world,
                parts: dict[str, list[Tensor]] = parts,
            ) -> None:
                assert given is world
                for name, value in whole.items():
                    rows = own_rows(len(value), world.rank, world.size)
                    out = torch.full((len(rows), *value.shape[1:]), torch.nan, dtype=dtype)
                    write(name, out, rows.start)
                    parts[name].append(out)

            monkeypatch.setattr(module, "assemble", assemble)
            read = getattr(module, f"read_{module.__name__.rpartition('.')[2]}")
            read(folder, dtype=dtype, world=world)
        for name, value in whole.items():
            assert torch.equal(torch.cat(parts[name]), value), name
    monkeypatch.undo()


@pytest.fixture
def odd_model(tiny_config: LlamaConfig, request: pytest.FixtureRequest) -> Llama:
    """A random model, tied or not, with an odd number of rows in most tensors."""
    model = Llama(replace(tiny_config, n_layers=2, tied_embeddings=request.param))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.requires_grad_(False)


@pytest.mark.parametrize("odd_model", [False, True], indirect=True)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_rows_of_hugging_face(
    odd_model: Llama,
    dtype: torch.dtype | None,
    tmp_path: Path,
    tiny_tokenizer_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_hugging_face(odd_model, tmp_path, "40KB")
    shutil.copy(tiny_tokenizer_path, tmp_path / "tokenizer.model")
    check_rows(hugging_face, tmp_path, dtype, monkeypatch)


@pytest.mark.parametrize("odd_model", [False, True], indirect=True)
@pytest.mark.parametrize(("shards", "embedding_dim"), [(1, 1), (2, 1), (2, 0)])
def test_rows_of_meta(
    odd_model: Llama,
    shards: int,
    embedding_dim: int,
    write_meta: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_meta(odd_model, shards=shards, embedding_dim=embedding_dim)
    check_rows(meta, folder, None, monkeypatch)


def test_rows_of_litgpt(
    tiny_tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(LITGPT, tmp_path, dirs_exist_ok=True)
    shutil.copy(tiny_tokenizer_path, tmp_path / "tokenizer.model")
    check_rows(litgpt, tmp_path, None, monkeypatch)


@pytest.mark.parametrize("odd_model", [False], indirect=True)
def test_a_file_that_is_read_whole_is_refused(
    odd_model: Llama, write_meta: Callable[..., Path]
) -> None:
    folder = write_meta(odd_model, archive=False)
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth must be a torch archive, of whi"):
        meta.read_meta(folder, world=World(0, 2))
    assert meta.read_meta(folder)[0].config.dim == odd_model.config.dim
