"""Reads a base in Meta's format: consolidated.*.pth, params.json and tokenizer.model in a folder.

Shards are joined tensor by tensor by the table below, straight into the model's memory and dtype.
Only tensors are unpickled. Whatever is missing, surplus or of another shape is an error.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llama_adapter.checkpoints.meta_params import read_params
from llama_adapter.checkpoints.torch_file import open_torch
from llama_adapter.config import LlamaConfig
from llama_adapter.model import Llama
from llama_adapter.tokenizer import Tokenizer

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
MODEL_TENSORS: dict[str, int | None] = {"norm.weight": None, "output.weight": 0}
# LLaMA 1 and 2 split it by column, LLaMA 3 by row: the shapes tell which
EMBEDDING = "tok_embeddings.weight"
# buffers of rotary frequencies, which follow from the configuration
IGNORED_TENSOR = re.compile(r"(.*\.)?rope\.freqs")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Shard:
    """One consolidated.*.pth and its tensors by name, which leave it as they are used."""

    path: Path
    tensors: dict[str, Tensor]


def is_meta(folder: Path) -> bool:
    """Whether a folder is meant as one of Meta's: it has a params.json or a consolidated file."""
    return (folder / "params.json").exists() or any(folder.glob("consolidated.*"))


def read_meta(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Llama, Tokenizer]:
    """Read a model and its tokenizer.

    Args:
        folder: holds consolidated.00.pth and so on, params.json and tokenizer.model.
        dtype: of the loaded weights; None keeps the files' own.
        device: where the weights go.

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
    shards = [_open_shard(path) for path in paths]
    config = replace(config, tied_embeddings=_is_tied(shards))
    model = _assemble(config, shards, dtype, torch.device(device))
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
    missing = sorted(set(range(max(numbered) + 1)) - set(numbered))
    if missing:
        names = ", ".join(f"consolidated.{number:02d}.pth" for number in missing)
        raise FileNotFoundError(f"{folder} lacks {names}: copy the missing shards into it")
    return [numbered[number] for number in sorted(numbered)]


def _open_shard(path: Path) -> Shard:
    content = open_torch(path)
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name} must be a tensor, got {type(value).__name__}")
    tensors = {name: value for name, value in content.items() if not IGNORED_TENSOR.match(name)}
    return Shard(path, tensors)


def _is_tied(shards: list[Shard]) -> bool:
    """Whether the output is the embedding: it is absent, or saved a second time with one content.

    A second copy is dropped.
    """
    pairs = [(shard.tensors.get("output.weight"), shard.tensors.get(EMBEDDING)) for shard in shards]
    if all(output is None for output, _ in pairs):
        return True
    for output, embedding in pairs:
        if output is None or embedding is None or output.shape != embedding.shape:
            return False
        # the first row tells nearly always, without reading the rest
        if not torch.equal(output[:1], embedding[:1]) or not torch.equal(output, embedding):
            return False
    for shard in shards:
        del shard.tensors["output.weight"]
    return True


def _assemble(
    config: LlamaConfig, shards: list[Shard], dtype: torch.dtype | None, device: torch.device
) -> Llama:
    with torch.device("meta"):
        model = Llama(config)
    model.requires_grad_(False)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    _check_names(expected, shards)
    _check_shard_count(expected, shards)
    dtype = _common_dtype(shards, dtype)
    state = {}
    for name, shape in expected.items():
        pieces = [shard.tensors.pop(name) for shard in shards]
        state[name] = _join(name, shape, pieces, shards, dtype, device)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _check_names(expected: Iterable[str], shards: list[Shard]) -> None:
    for shard in shards:
        missing = [name for name in expected if name not in shard.tensors]
        surplus = sorted(shard.tensors.keys() - set(expected))
        for problem, names in (("lacks", missing), ("has surplus", surplus)):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise ValueError(
                    f"{shard.path} {problem} tensors: {', '.join(names[:3])}{more}; "
                    "is params.json another model's?"
                )


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


def _common_dtype(shards: list[Shard], wanted: torch.dtype | None) -> torch.dtype:
    """The dtype to load: the wanted one, or the one that all tensors share."""
    name, first = next(iter(shards[0].tensors.items()))
    for shard in shards:
        for other, tensor in shard.tensors.items():
            if tensor.dtype not in DTYPES:
                raise ValueError(
                    f"{shard.path}: {other} must be float32, float16 or bfloat16, "
                    f"got {tensor.dtype}"
                )
            if wanted is None and tensor.dtype != first.dtype:
                raise ValueError(
                    f"{shard.path}: {other} is {tensor.dtype}, but {name} is {first.dtype}: "
                    "give the dtype to load them in"
                )
    return first.dtype if wanted is None else wanted


def _join(
    name: str,
    shape: tuple[int, ...],
    pieces: list[Tensor],
    shards: list[Shard],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """One tensor of the model, copied piece by piece into its final place."""
    short = re.sub(r"^layers\.\d+\.", "", name)
    dims = (0, 1) if name == EMBEDDING else ((MODEL_TENSORS | LAYER_TENSORS)[short],)
    joined = torch.empty(shape, dtype=dtype, device=device)
    for dim in dims:
        if dim is None and all(tuple(piece.shape) == shape for piece in pieces):
            return joined.copy_(pieces[0])
        if dim is not None and _fits(shape, pieces, dim):
            for part, piece in zip(
                joined.split([piece.shape[dim] for piece in pieces], dim), pieces, strict=True
            ):
                part.copy_(piece)
            return joined
    got = [tuple(piece.shape) for piece in pieces]
    where = shards[0].path if len(shards) == 1 else shards[0].path.parent
    raise ValueError(
        f"{where}: {name} must have shape {shape}, got {got[0]}"
        if len(got) == 1
        else f"{where}: {name} must join to shape {shape}, got shards of {got}"
    )


def _fits(shape: tuple[int, ...], pieces: list[Tensor], dim: int) -> bool:
    """Whether the pieces, joined along `dim`, have this shape."""
    if any(piece.ndim != len(shape) for piece in pieces):
        return False
    sizes = [list(piece.shape) for piece in pieces]
    total = sum(size.pop(dim) for size in sizes)
    others = list(shape)
    return total == others.pop(dim) and all(size == others for size in sizes)
