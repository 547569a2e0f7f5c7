"""How do the tests write a folder in Meta's format, split into shards as Meta splits it?"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama_adapter.model import Llama

WriteMeta = Callable[..., Path]


def meta_shards(model: Llama, count: int, embedding_dim: int) -> list[dict[str, Tensor]]:
    """The state of each shard: by columns for wo, w2 and the older embeddings, else by rows."""
    shards: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, value in model.state_dict().items():
        dim = 1 if "wo." in name or "w2." in name else 0
        if "tok_embeddings" in name:
            dim = embedding_dim
        pieces = [value] * count if value.ndim == 1 else value.tensor_split(count, dim)
        for shard, piece in zip(shards, pieces, strict=True):
            shard[name] = piece.clone()
    return shards


def meta_params(model: Llama) -> dict[str, object]:
    """The params.json of a model, as LLaMA 2 writes it."""
    config = model.config
    return {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "multiple_of": config.multiple_of,
        "norm_eps": config.norm_eps,
        "vocab_size": -1,
    }


@pytest.fixture
def write_meta(tiny_tokenizer_path: Path, tmp_path: Path) -> WriteMeta:
    """A function that writes a model as Meta does, into a new folder, and returns the folder."""

    def write(
        model: Llama,
        *,
        shards: int = 1,
        embedding_dim: int = 1,
        params: dict[str, object] | None = None,
        extra: dict[str, Tensor] | None = None,
        archive: bool = True,
    ) -> Path:
        folder = tmp_path / f"base-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for number, state in enumerate(meta_shards(model, shards, embedding_dim)):
            path = folder / f"consolidated.{number:02d}.pth"
            torch.save(state | (extra or {}), path, _use_new_zipfile_serialization=archive)
        content = meta_params(model) | (params or {})
        (folder / "params.json").write_text(json.dumps(content), encoding="utf-8")
        shutil.copy(tiny_tokenizer_path, folder / "tokenizer.model")
        return folder

    return write


@pytest.fixture(
    scope="session",
    params=[
        "committed",
        pytest.param(
            "written",
            marks=pytest.mark.skipif(
                find_spec("litgpt") is None, reason="litgpt is not installed: make test-all runs it"
            ),
        ),
    ],
)
def litgpt_files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the committed fixtures, or one that litgpt writes now with other numbers."""
    committed = Path(__file__).parent / "fixtures"
    if request.param == "committed":
        return committed
    written = tmp_path_factory.mktemp("litgpt")
    for script in ("make_litgpt.py", "make_litgpt_base.py"):
        subprocess.run([sys.executable, committed / script, written, "11"], check=True)
    return written
