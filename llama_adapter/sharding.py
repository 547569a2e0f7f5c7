"""A frozen base that no process holds whole: each keeps some rows of every weight.

torch's fully_shard (FSDP2) gathers a layer's weights for its forward pass and, where gradients run
through it, for its backward pass, and frees them again. They are frozen: no gradient of theirs is
sent. The adapter is no part of it; every process holds all of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, distributed, nn

from llama_adapter.adapter import Adapter, LayerPrompt, Prompts, Rows
from llama_adapter.model import Block, Llama
from llama_adapter.world import World

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


def check_launched() -> None:
    """Refuse to shard where there is nothing to shard over.

    Raises:
        ValueError: torchrun has not started this process.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        raise ValueError(
            "shard needs processes that torchrun has started, as in torchrun --nproc-per-node 2 "
            "-m llama_adapter finetune --shard, got one process alone, which continues a sharded "
            "run with --resume --no-shard"
        )


def shard(model: Llama, world: World, device: torch.device | str) -> None:
    """Split every weight of a model over the processes, in place, by rows.

    Args:
        model: on the meta device, frozen, in its final dtype.
        world: the processes.
        device: where the parts will be.
    """
    # 0.6 s to import, and for those alone who shard
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(torch.device(device).type, (world.size,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    if not model.config.tied_embeddings:
        fully_shard(model.tok_embeddings, mesh=mesh, reshard_after_forward=True)
    # what is left: the norm, and the output, which the loss needs after the forward pass
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "run")


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are split over processes."""
    # by the name of a class that fully_shard adds, which costs no import
    return any(base.__name__ == "FSDPModule" for base in type(model).__mro__)


def own_rows(rows: int, rank: int, size: int) -> range:
    """Which of a tensor's rows a process keeps, as torch.chunk cuts: the last may have none."""
    most = -(-rows // size)
    return range(min(rank * most, rows), min((rank + 1) * most, rows))


def as_part(rows: Tensor, like: Tensor) -> Tensor:
    """A process's own rows as its part of a sharded tensor."""
    sharded = cast("DTensor", like)
    return _from_parts(rows, sharded, sharded.placements, sharded.shape)


def columns(tensor: Tensor, index: Tensor) -> Tensor:
    """Columns (R, N) of a matrix (R, C), in every process; no others of a sharded one are sent."""
    if not _is_part(tensor):
        return tensor[:, index]
    sharded = cast("DTensor", tensor)
    picked, shape = sharded.to_local()[:, index], torch.Size((tensor.shape[0], len(index)))
    return _from_parts(picked, sharded, sharded.placements, shape).full_tensor()


def elements(tensor: Tensor, index: Tensor) -> Tensor:
    """Values (N,) at flat positions, in every process; no others of a sharded tensor are sent."""
    if not _is_part(tensor):
        return tensor.reshape(-1)[index]
    from torch.distributed.tensor import Partial

    sharded = cast("DTensor", tensor)
    mesh, local = sharded.device_mesh, sharded.to_local().reshape(-1)
    rows = own_rows(tensor.shape[0], mesh.get_local_rank(), mesh.size())
    index = index - rows.start * tensor[:1].numel()
    own = (index >= 0) & (index < len(local))
    # each is in one process, and the others add zeros
    found = local.new_zeros(len(index))
    found[own] = local[index[own]]
    return _from_parts(found, sharded, [Partial()], found.shape).full_tensor()


def _is_part(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")


def _from_parts(
    own: Tensor, like: "DTensor", placements: Sequence["Placement"], shape: torch.Size
) -> "DTensor":
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        own, like.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )


def project_in_place(model: Llama, adapter: Adapter, visual: Tensor | None = None) -> Prompts:
    """As `Llama.project`, but each layer's prompt is projected when the layer runs.

    Its weights are there only then: before, they would be gathered once more for this alone.
    """
    layers, images = (
        _ProjectedInPlace(model, rows)
        for rows in (adapter.prompt_rows(visual), adapter.visual_rows(visual))
    )
    return Prompts(layers, visual=images, visual_index=adapter.visual_index(visual))


class _ProjectedInPlace(Mapping[int, LayerPrompt]):
    def __init__(self, model: Llama, rows: Mapping[int, Rows]) -> None:
        self.model, self.rows = model, rows

    def __getitem__(self, layer: int) -> LayerPrompt:
        rows = self.rows[layer]
        return cast(Block, self.model.layers[layer]).attention.project_prompt(rows)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)
