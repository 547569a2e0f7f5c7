"""The adapter of a host on disk: an adapter file as the lean model has it, nothing of the host."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints.adapter_file import read_adapter_for, save_adapter
from llama_adapter.hosts import SUBMODULE, adapt, adapter_of
from llama_adapter.hosts.facts import fingerprint_of_host, shape_of_host

# as in a run folder
FILE = "adapter.safetensors"


def save_adapted(
    model: nn.Module,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    is_main_process: bool = True,
) -> None:
    """Write the adapter of a host, the host's weights not: `save_pretrained` of an adapted model.

    Args:
        model: a host that `adapt` put an adapter on.
        folder: where FILE goes; it is made where it is absent.
        state_dict: the model's, gathered by whoever holds it in pieces; None takes the parameters.
        is_main_process: whether this process writes.

    Raises:
        ValueError: the model has no adapter.
    """
    adapter = adapter_of(model)
    if adapter is None:
        raise ValueError("model must have an adapter, put there by adapt(model)")
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


def load_adapted(model: Any, path: str | Path) -> Adapter:
    """Put an adapter that was trained here, or on the lean model of the same base, on a host.

    Args:
        model: the host, without an adapter.
        path: an adapter file, or a folder with FILE in it.

    Returns:
        The adapter, trainable.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, was trained on another base, or the host has an adapter.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    adapter = read_adapter_for(file, fingerprint_of_host(model), shape_of_host(model))
    return adapt(model, adapter=adapter)
