"""The adapter of a host on disk: an adapter file as the lean model has it, nothing of the host."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints.adapter_file import read_adapter_for, save_adapter
from llama_adapter.hosts.facts import fingerprint_of_host, shape_of_host

# the adapter's name in the host, and so the beginning of its parameters' names
SUBMODULE = "llama_adapter"
# as in a run folder
FILE = "adapter.safetensors"


def adapter_of(model: nn.Module) -> Adapter | None:
    """The adapter that `adapt` put on a model, or None."""
    found = model._modules.get(SUBMODULE)
    return found if isinstance(found, Adapter) else None


def save_adapted(
    model: nn.Module,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    **_: Any,
) -> None:
    """Write the adapter of a host, the host's weights not: `save_pretrained` of an adapted model.

    Args:
        model: a host that `adapt` put an adapter on.
        folder: where FILE goes; it is made where it is absent.
        state_dict: the model's, gathered by whoever holds it in pieces; None takes the parameters.
        is_main_process: whether this process writes.
        push_to_hub: must be False.
        **_: what else transformers' method takes: an adapter is one safetensors file anyway.

    Raises:
        ValueError: the model has no adapter, or is to be pushed.
    """
    adapter = adapter_of(model)
    if adapter is None:
        raise ValueError("model must have an adapter, put there by adapt(model)")
    if push_to_hub:
        raise ValueError("push_to_hub must be False: upload the folder that was written")
    if not is_main_process:
        return
    if state_dict is not None:
        whole = Adapter(adapter.config, shape_of_host(model), layers=adapter.layers)
        whole.load_state_dict(
            {name: state_dict[f"{SUBMODULE}.{name}"] for name in adapter.state_dict()}
        )
        adapter = whole
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_adapter(Path(folder) / FILE, adapter, fingerprint_of_host(model))


def read_adapted(model: Any, path: str | Path) -> Adapter:
    """Read an adapter that was trained on this host, or on the lean model of the same base.

    Args:
        model: the host, without an adapter.
        path: an adapter file, or a folder with FILE in it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or was trained on another base.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file() and not (path / FILE).is_file():
        raise FileNotFoundError(
            f"{path} is a folder of PEFT: llama-adapter convert {path} {FILE} --to llama-adapter "
            "--base BASE makes an adapter file of it"
        )
    file = path / FILE if path.is_dir() else path
    return read_adapter_for(file, fingerprint_of_host(model), shape_of_host(model))


def load_adapted(model: Any, path: str | Path) -> None:
    """Read an adapter into the one that is on a host, whose parameters stay the same tensors.

    Args:
        model: the host, with an adapter of the file's shape.
        path: as in `read_adapted`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as in `read_adapted`, or the adapter is of another shape, or there is none.
    """
    adapter = adapter_of(model)
    if adapter is None:
        raise ValueError("model must have an adapter, put there by adapt(model)")
    found = read_adapted(model, path)
    if (found.config, found.layers) != (adapter.config, adapter.layers):
        raise ValueError(
            f"{path} must hold an adapter like the model's, {adapter.config} in layers "
            f"{adapter.layers}, got {found.config} in layers {found.layers}"
        )
    adapter.load_state_dict(found.state_dict())
