"""Reads a base in Meta's format: consolidated.*.pth, params.json and tokenizer.model in a folder.

Shards are joined tensor by tensor by the table below, straight into the model's memory and dtype.
Only tensors are unpickled. Whatever is missing, surplus or of another shape is an error.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llama_adapter.checkpoints.assemble import (
    EMBEDDING,
    OUTPUT,
    assemble,
    check_names,
    check_shape,
    common_dtype,
    copy_rows,
    expected_shapes,
    is_copy,
)
from llama_adapter.checkpoints.meta_params import read_params
from llama_adapter.checkpoints.torch_file import check_tensors, read_torch_file
from llama_adapter.config import LlamaConfig
from llama_adapter.model import Llama
from llama_adapter.tokenizer import Tokenizer
from llama_adapter.world import World

# dimension along which shards are joined; None: every shard holds the whole tensor
LAYER_TENSORS: dict[str, int | None] = {
    "attention.wq.weight": 0,
    "attention.wk.weight": 0,
    "attention.wv.weight": 0,
    "attention.wo.weight": 1,
    "feed_forward.w1.weight": 0,
    "feed_forward.w2.weight": 1,
    "feed_forward.w3.weight": 0,
    "attention_norm.weight": None,
    "ffn_norm.weight": None,
}
MODEL_TENSORS: dict[str, int | None] = {"norm.weight": None, OUTPUT: 0}
# buffers of rotary frequencies, which follow from the configuration
IGNORED_TENSOR = re.compile(r"(.*\.)?rope\.freqs")


@dataclass(frozen=True)
class Shard:
    """One consolidated.*.pth and its tensors by name, which leave it as they are used."""

    path: Path
    tensors: dict[str, Tensor]


def is_meta(folder: Path) -> bool:
    """Whether a folder is meant as one of Meta's: it has a consolidated file or a params.json."""
    if any(folder.glob("consolidated.*.pth")):
        return True
    # Mistral puts its own params.json beside Hugging Face's files
    return (folder / "params.json").exists() and not (folder / "config.json").exists()


def read_meta(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    world: World | None = None,
) -> tuple[Llama, Tokenizer]:
    """Read a model and its tokenizer.

    Args:
        folder: holds consolidated.00.pth and so on, params.json and tokenizer.model.
        dtype: of the loaded weights; None keeps the files' own.
        device: where the weights go.
        world: the processes that share the weights out; None leaves all to this one.

    Returns:
        The model, frozen and in evaluation mode, and its tokenizer.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, needs code to be read, or does not fit the others.
    """
    for name, remedy in (
        ("params.json", "copy it from where the weights came"),
        ("tokenizer.model", "copy it into the folder; LLaMA 1 and 2 keep it one folder up"),
    ):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist: {remedy}")
    paths = shard_paths(folder)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    config = read_params(folder / "params.json", tokenizer.vocab_size)
    shards = [_open_shard(path, whole=world is None) for path in paths]
    config = replace(config, tied_embeddings=_is_tied(shards))
    model = _assemble(config, shards, dtype, torch.device(device), world)
    return model, tokenizer


def shard_paths(folder: Path) -> list[Path]:
    """The consolidated files in the order of their numbers.

    Raises:
        FileNotFoundError: there is none, or a number is missing.
    """
    numbered = {}
    for path in folder.glob("consolidated.*.pth"):
        match = re.fullmatch(r"consolidated\.(\d+)\.pth", path.name)
        if match:
            numbered[int(match[1])] = path
    if not numbered:
        raise FileNotFoundError(f"{folder} holds no consolidated.00.pth: the weights are missing")
    missing = [number for number in range(len(numbered)) if number not in numbered]
    if missing:
        names = ", ".join(f"consolidated.{number:02d}.pth" for number in missing[:8])
        raise FileNotFoundError(f"{folder} lacks {names}: copy the missing shards into it")
    return [numbered[number] for number in sorted(numbered)]


def _open_shard(path: Path, whole: bool) -> Shard:
    content = check_tensors(read_torch_file(path, whole=whole), path, tied=(EMBEDDING, OUTPUT))
    tensors = {name: value for name, value in content.items() if not IGNORED_TENSOR.match(name)}
    return Shard(path, tensors)


def _is_tied(shards: list[Shard]) -> bool:
    """Whether the output is the embedding: it is absent, or saved a second time with one content.

    A second copy is dropped.
    """
    pairs = [(shard.tensors.get(OUTPUT), shard.tensors.get(EMBEDDING)) for shard in shards]
    if all(output is None for output, _ in pairs):
        return True
    if not all(is_copy(*pair) for pair in pairs):
        return False
    for shard in shards:
        del shard.tensors[OUTPUT]
    return True


def _assemble(
    config: LlamaConfig,
    shards: list[Shard],
    dtype: torch.dtype | None,
    device: torch.device,
    world: World | None,
) -> Llama:
    expected = expected_shapes(config)
    for shard in shards:
        check_names(shard.tensors, expected, shard.path, "is params.json another model's?")
    _check_shard_count(expected, shards)
    found = [
        (shard.path, name, value.dtype) for shard in shards for name, value in shard.tensors.items()
    ]

    def write(name: str, out: Tensor, start: int) -> None:
        pieces = [shard.tensors.pop(name) for shard in shards]
        _join(name, expected[name], out, start, pieces, shards)

    return assemble(config, write, common_dtype(found, dtype), device, world)


def _check_shard_count(expected: dict[str, tuple[int, ...]], shards: list[Shard]) -> None:
    """Shards missing at the end leave no gap in the numbers: their rows are missing."""
    name = "layers.0.attention.wq.weight"
    rows = sum(shard.tensors[name].shape[0] for shard in shards)
    total = expected[name][0]
    whole = total * len(shards) // max(rows, 1)
    if rows < total and rows * whole == total * len(shards):
        raise ValueError(
            f"{shards[0].path.parent} holds {len(shards)} of {whole} shards, or params.json is "
            f"another model's: {name} has {rows} of {total} rows"
        )


def _join(
    name: str,
    shape: tuple[int, ...],
    out: Tensor,
    start: int,
    pieces: list[Tensor],
    shards: list[Shard],
) -> None:
    """Fill rows of one tensor of the model, from `start` on, piece by piece."""
    short = re.sub(r"^layers\.\d+\.", "", name)
    # LLaMA 1 and 2 split the embedding by column, LLaMA 3 by row: the shapes tell which
    dims = (0, 1) if name == EMBEDDING else ((MODEL_TENSORS | LAYER_TENSORS)[short],)
    for dim in dims:
        if dim is None and all(tuple(piece.shape) == shape for piece in pieces):
            copy_rows(pieces[0], out, start)
            return
        if dim == 1 and _fits(shape, pieces, dim):
            for part, piece in zip(
                out.split([piece.shape[1] for piece in pieces], 1), pieces, strict=True
            ):
                copy_rows(piece, part, start)
            return
        if dim == 0 and _fits(shape, pieces, dim):
            for piece in pieces:
                # the rows wanted that this piece has, counted from its own first one
                first, last = max(start, 0), min(start + len(out), len(piece))
                if first < last:
                    copy_rows(piece, out[first - start : last - start], first)
                start -= len(piece)
            return
    if len(pieces) == 1:
        check_shape(name, pieces[0].shape, shape, shards[0].path)
    got = [tuple(piece.shape) for piece in pieces]
    raise ValueError(
        f"{shards[0].path.parent}: {name} must join to shape {shape}, got shards of {got}"
    )


def _fits(shape: tuple[int, ...], pieces: list[Tensor], dim: int) -> bool:
    """Whether the pieces, joined along `dim`, have this shape."""
    if any(piece.ndim != len(shape) for piece in pieces):
        return False
    sizes = [list(piece.shape) for piece in pieces]
    total = sum(size.pop(dim) for size in sizes)
    others = list(shape)
    return total == others.pop(dim) and all(size == others for size in sizes)
