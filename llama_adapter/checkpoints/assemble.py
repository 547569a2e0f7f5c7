"""Fills a model with a checkpoint's tensors, one at a time, straight into their final memory.

What every format needs: the names and shapes that a configuration asks for, one dtype, and the
order of query and key rows that Hugging Face and litgpt have and Meta has not.
"""

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llama_adapter.checkpoints.fingerprint import shape_of
from llama_adapter.config import LlamaConfig, RopeScaling
from llama_adapter.model import Llama
from llama_adapter.sharding import as_part, own_rows, shard
from llama_adapter.tokenizer import Tokenizer
from llama_adapter.world import World

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
# more is no model, and its modules alone would fill the memory
_MOST_LAYERS = 1000
_LARGEST = 2**31 - 1


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, or holds no object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: copy it from where the weights came")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def make_config(values: dict[str, Any], where: str | Path) -> LlamaConfig:
    """A configuration of values from a file.

    Raises:
        ValueError: the values do not fit each other, or are beyond any model.
    """
    try:
        config = LlamaConfig(**values)
        shape = shape_of(config)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from None
    if config.n_layers > _MOST_LAYERS:
        raise ValueError(
            f"{where}: n_layers must be at most {_MOST_LAYERS}, got {config.n_layers!r:.40}"
        )
    for name, value in shape.items():
        if not 0 < value <= _LARGEST:
            raise ValueError(f"{where}: {name} must be from 1 to {_LARGEST}, got {value!r:.40}")
    return config


def size_of(given: dict[str, Any], key: str, path: Path) -> int:
    """A size in a configuration.

    Raises:
        ValueError: the key is missing, or its value no integer that a size can be.
    """
    if given.get(key) is None:
        raise ValueError(f"{path}: key {key!r} is missing")
    value = given[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
        raise ValueError(
            f"{path}: {key} must be an integer from 1 to {_LARGEST}, got {value!r:.60}"
        )
    return value


def check_vocabulary(config: LlamaConfig, tokenizer: Tokenizer, where: str | Path) -> None:
    """Refuse a tokenizer with more tokens than the model has rows; padding rows are welcome.

    Raises:
        ValueError: it has more.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{where}: vocab_size is {config.vocab_size}, but {tokenizer.path.name} has "
            f"{tokenizer.vocab_size} tokens; they belong to different models"
        )


def rope_scaling(values: dict[str, Any], where: str) -> RopeScaling:
    """LLaMA 3.1's scaling, from the names of `RopeScaling` or those of Hugging Face.

    Args:
        values: numbers by name; what is absent has LLaMA 3.1's value.
        where: file and key, for messages.

    Raises:
        ValueError: a name is unknown, a value is no positive number, or the two bounds cross.
    """
    known = {spec.name for spec in fields(RopeScaling)}
    given = dict(values)
    # the names of the same number elsewhere: Hugging Face's and litgpt's
    for name in ("original_max_position_embeddings", "original_max_seq_len"):
        if name in given:
            given["original_context"] = given.pop(name)
    if set(given) - known:
        raise ValueError(f"{where} must have {sorted(known)}, got {sorted(values)}")
    for key, value in given.items():
        if not is_positive(value):
            raise ValueError(f"{where}'s {key} must be a positive number, got {value!r:.40}")
    scaling = RopeScaling(**given)
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ValueError(
            f"{where}'s low_freq_factor must be below high_freq_factor = "
            f"{scaling.high_freq_factor}, got {scaling.low_freq_factor}"
        )
    return scaling


def is_positive(value: object) -> bool:
    """Whether a value of a JSON file is a finite number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 < value < 1e30


class Rows(Protocol):
    """A tensor, or what a file would give of one: its rows are read by slices."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Some of its rows."""
        ...


def copy_rows(source: Rows, out: Tensor, start: int, per_head: int | None = None) -> None:
    """Copy a tensor's rows from `start` on into `out`, as many as it has; no others are read.

    Args:
        source: (N, ...), with rows of one head after the other where `per_head` is given.
        out: (n, ...), n <= N - start.
        start: the first row.
        per_head: D of query or key rows that are halves of each head, and go to Meta's
            neighbouring pairs; whole heads are read of them.
    """
    stop = start + len(out)
    if len(out) == 0:
        return
    if per_head is None:
        out.copy_(source[start:stop])
        return
    first, last = start // per_head, -(-stop // per_head)
    heads = source[first * per_head : last * per_head]
    if len(heads) == len(out):
        halves_to_pairs(heads, out, last - first)
        return
    # a part ends within a head
    pairs = torch.empty_like(heads)
    halves_to_pairs(heads, pairs, last - first)
    out.copy_(pairs[start - first * per_head :][: len(out)])


def halves_to_pairs(rows: Tensor, out: Tensor, heads: int) -> None:
    """Copy query or key rows (H*D, C), kept as halves of each head, to Meta's neighbouring pairs.

    Row i of a head goes to row 2i, row i + D/2 to 2i + 1. No second copy is made on a CPU.
    """
    out.unflatten(0, (heads, -1, 2)).copy_(rows.unflatten(0, (heads, 2, -1)).transpose(1, 2))


def is_copy(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are there and have one shape and one content."""
    if a is None or b is None or a.shape != b.shape:
        return False
    # the first row tells nearly always, without reading the rest
    return torch.equal(a[:1], b[:1]) and torch.equal(a, b)


def expected_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model, by its name."""
    return {name: tuple(value.shape) for name, value in _bare(config).state_dict().items()}


def check_names(present: Collection[str], expected: Iterable[str], where: Path, hint: str) -> None:
    """Refuse a file that lacks tensors or has surplus ones.

    Raises:
        ValueError: the first few are named, followed by the hint.
    """
    wanted = list(expected)
    missing = [name for name in wanted if name not in present]
    surplus = sorted(set(present) - set(wanted))
    for problem, names in (("lacks", missing), ("has surplus", surplus)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            # names come from the file, and may hold anything
            listed = ", ".join(ascii(name)[1:-1] for name in names[:3])
            raise ValueError(f"{where} {problem} tensors: {listed}{more}; {hint}")


def check_shape(name: str, got: Iterable[int], shape: tuple[int, ...], where: Path) -> None:
    """Refuse a tensor of another shape.

    Raises:
        ValueError: it has another one.
    """
    if tuple(got) != shape:
        raise ValueError(f"{where}: {name} must have shape {shape}, got {tuple(got)}")


def common_dtype(
    tensors: Iterable[tuple[Path, str, torch.dtype]], wanted: torch.dtype | None
) -> torch.dtype:
    """The dtype to load: the wanted one, or the one that all tensors share.

    Args:
        tensors: file, name and dtype of each.
        wanted: None asks for the files' own.

    Raises:
        ValueError: a tensor is of a dtype that weights have not, or the files mix them.
    """
    first: tuple[str, torch.dtype] | None = None
    for path, name, dtype in tensors:
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} must be float32, float16 or bfloat16, got {dtype}")
        first = first or (name, dtype)
        if wanted is None and dtype != first[1]:
            raise ValueError(
                f"{path}: {name} is {dtype}, but {first[0]} is {first[1]}: "
                "give the dtype to load them in"
            )
    if first is None:
        raise ValueError("a checkpoint must hold tensors, got none")
    return first[1] if wanted is None else wanted


def assemble(
    config: LlamaConfig,
    write: Callable[[str, Tensor, int], None],
    dtype: torch.dtype,
    device: torch.device | str,
    world: World | None = None,
) -> Llama:
    """A model whose tensors are allocated and filled one after the other.

    Args:
        config: the model's.
        write: fills a tensor's rows, given its name, the memory and the first of them; called once
            for each tensor that has rows here, in the model's order.
        dtype, device: of the weights.
        world: the processes that share the weights out; None leaves all of them to this one.

    Returns:
        The model, frozen and in evaluation mode.

    Raises:
        ValueError: a tensor cannot be allocated.
    """
    model = _bare(config).to(dtype).requires_grad_(False)
    if world is not None:
        shard(model, world, device)
    state = {}
    for name, value in model.state_dict().items():
        rank, size = (0, 1) if world is None else (world.rank, world.size)
        rows = own_rows(value.shape[0], rank, size)
        try:
            own = torch.empty((len(rows), *value.shape[1:]), dtype=dtype, device=device)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{name} of shape {tuple(value.shape)}: {reason}") from None
        if rows:
            write(name, own, rows.start)
        state[name] = own if world is None else as_part(own, value)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _bare(config: LlamaConfig) -> Llama:
    try:
        with torch.device("meta"):
            return Llama(config)
    except RuntimeError as error:
        raise ValueError(f"no model has the shape of {config}: {error}") from None
