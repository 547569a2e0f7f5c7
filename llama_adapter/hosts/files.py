"""The adapter of a host on disk: an adapter file as the lean model has it, nothing of the host."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints.adapter_file import read_adapter_for, save_adapter
from llama_adapter.hosts.facts import ENCODERS, Tower, tower_of
from llama_adapter.hosts.task_head import check_trained

# the adapter's name in the host, and so the beginning of its parameters' names
SUBMODULE = "llama_adapter"
# as in a run folder
FILE = "adapter.safetensors"


def submodule_of(slot: str) -> str:
    """The adapter's name in the host, by `Tower.slot`."""
    return f"{SUBMODULE}_{slot}" if slot else SUBMODULE


def file_of(slot: str) -> str:
    """The name of an adapter's file in a folder, by `Tower.slot`."""
    return f"{slot}_{FILE}" if slot else FILE


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters that are on a model, by `Tower.slot`: "" alone, but for CLIP's encoders."""
    own = getattr(model, "_modules", {})
    held = {slot: own.get(submodule_of(slot)) for slot in ("", *ENCODERS)}
    return {slot: one for slot, one in held.items() if isinstance(one, Adapter)}


def adapter_of(model: nn.Module, encoder: str | None = None) -> Adapter | None:
    """The adapter that `adapt` put on a model, or None.

    Args:
        model: any model.
        encoder: as `adapt` was given it.

    Raises:
        ValueError: the model has no such encoder.
    """
    slot = "" if encoder is None else tower_of(model, encoder).slot
    return adapters_of(model).get(slot)


def save_adapted(
    model: nn.Module,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    **_: Any,
) -> None:
    """Write the adapters of a host, the host's weights not: `save_pretrained` of an adapted model.

    Args:
        model: a host that `adapt` put an adapter on.
        folder: where FILE goes, of CLIP's text encoder text_FILE; it is made where it is absent.
        state_dict: the model's, gathered by whoever holds it in pieces; None takes the parameters.
        is_main_process: whether this process writes.
        push_to_hub: must be False.
        **_: what else transformers' method takes: an adapter is one safetensors file anyway.

    Raises:
        ValueError: the model has no adapter, another head since, or is to be pushed, or state_dict
            lacks a number of the adapter.
    """
    adapters = adapters_of(model)
    if not adapters:
        raise ValueError("model must have an adapter, put there by adapt(model)")
    if push_to_hub:
        raise ValueError("push_to_hub must be False: upload the folder that was written")
    if not is_main_process:
        return
    for slot, adapter in adapters.items():
        tower = tower_of(model, slot or None)
        if state_dict is None:
            check_trained(tower, adapter)
        else:
            # a generator of its own: saving draws no random number from the caller's
            whole = Adapter(
                adapter.config,
                tower.shape(),
                layers=adapter.layers,
                generator=torch.Generator(),
                prompt_kind=adapter.prompt_kind,
                host=adapter.host,
            )
            names = {name: f"{submodule_of(slot)}.{name}" for name in adapter.state_dict()}
            lacking = sorted(set(names.values()) - state_dict.keys())
            if lacking:
                raise ValueError(f"state_dict must be the adapted model's, got none of {lacking}")
            whole.load_state_dict({name: state_dict[full] for name, full in names.items()})
            adapter = whole
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_adapter(Path(folder) / file_of(slot), adapter, tower.fingerprint())


def read_adapted(tower: Tower, path: str | Path) -> Adapter:
    """Read an adapter that was trained on this host, or on the lean model of the same base.

    Args:
        tower: the part of the host that it is for.
        path: an adapter file, or a folder with the one for this part in it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or was trained on another base.
    """
    path, name = Path(path), file_of(tower.slot)
    if (path / "adapter_config.json").is_file() and not (path / name).is_file():
        raise FileNotFoundError(
            f"{path} is a folder of PEFT: llama-adapter convert {path} {FILE} --to llama-adapter "
            "--base BASE makes an adapter file of it"
        )
    file = path / name if path.is_dir() else path
    return read_adapter_for(file, tower.fingerprint(), tower.shape(), tower.host.kind)


def load_adapted(model: Any, path: str | Path) -> None:
    """Read adapters into those that are on a host, whose parameters stay the same tensors.

    Args:
        model: the host, with adapters of the files' shapes.
        path: as in `read_adapted`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as in `read_adapted`, or an adapter is of another shape, or there is none.
    """
    adapters = adapters_of(model)
    if not adapters:
        raise ValueError("model must have an adapter, put there by adapt(model)")
    for slot, adapter in adapters.items():
        found = read_adapted(tower_of(model, slot or None), path)
        wanted, got = ((x.config, x.layers, x.prompt_kind, x.host) for x in (adapter, found))
        if wanted != got:
            raise ValueError(f"{path} must hold an adapter like the model's, {wanted}, got {got}")
        adapter.load_state_dict(found.state_dict())
