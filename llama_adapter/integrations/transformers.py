"""Models of transformers with our adapters: LLaMA, Mistral and Qwen2, with a gate per head.

The models stay of their own classes: `generate()`, `Trainer` and pipelines take them as ever, and
`save_pretrained` writes the adapter alone.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from llama_adapter.config import AdapterConfig
from llama_adapter.hosts import adapt as adapt_host
from llama_adapter.hosts import unadapt
from llama_adapter.hosts.attention import NAME, REMEDY, register
from llama_adapter.hosts.files import load_adapted, save_adapted

__all__ = ["NAME", "adapt", "from_pretrained", "register", "unadapt"]


def adapt(model: Any, adapter: AdapterConfig | str | Path | None = None) -> Any:
    """Put a new adapter, or one from a file, on a loaded model.

    Args:
        model: a LLaMA, Mistral or Qwen2 model for causal language modelling.
        adapter: an adapter file, or a folder that `save_pretrained` wrote; or the configuration of
            a new adapter, None for the papers'.

    Returns:
        The same model, frozen but for `model.llama_adapter`; its `save_pretrained` writes the
        adapter alone. `unadapt(model)` gives back the host as it was.

    Raises:
        ImportError: transformers is missing.
        FileNotFoundError: there is no such file.
        ValueError: the model is of another type, or the adapter belongs to another base.
    """
    if isinstance(adapter, str | Path):
        load_adapted(model, adapter)
    else:
        settings = asdict(AdapterConfig() if adapter is None else adapter)
        adapt_host(model, layers=settings.pop("n_layers"), **settings)
    model.__dict__["save_pretrained"] = partial(save_adapted, model)
    return model


def from_pretrained(
    base: str | Path, adapter: AdapterConfig | str | Path | None = None, **options: Any
) -> Any:
    """Load a model of transformers and put an adapter on it.

    Args:
        base: folder or hub name, as `AutoModelForCausalLM.from_pretrained` takes it.
        adapter: see `adapt`.
        **options: the other arguments of `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The adapted model, in evaluation mode as transformers loads it.

    Raises:
        ImportError: transformers is missing.
        FileNotFoundError: there is no such adapter file.
        ValueError: the model is of another type, or the adapter belongs to another base.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(f"{REMEDY} ({error})") from None
    return adapt(AutoModelForCausalLM.from_pretrained(base, **options), adapter)
