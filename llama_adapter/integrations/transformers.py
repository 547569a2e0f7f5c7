"""Models of transformers with our adapters: LLaMA, Mistral and Qwen2, with a gate per head.

The models stay of their own classes: `generate()`, `Trainer` and pipelines take them as ever, and
`save_pretrained` writes the adapter alone. A checkpoint of `Trainer` is loaded with
`from_pretrained(base, checkpoint)`; `resume_from_checkpoint` and `load_best_model_at_end` need
`AdapterTrainer` of transformers_trainer.py, as transformers' own looks for whole models.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama_adapter.config import AdapterConfig
from llama_adapter.hosts import adapt
from llama_adapter.hosts.attention import NAME, REMEDY, register

__all__ = ["NAME", "from_pretrained", "register"]


def from_pretrained(
    base: str | Path, adapter: AdapterConfig | str | Path | None = None, **options: Any
) -> Any:
    """Load a model of transformers and put an adapter on it.

    Args:
        base: folder or hub name, as `AutoModelForCausalLM.from_pretrained` takes it.
        adapter: an adapter file, or a folder that `save_pretrained` wrote; or the configuration of
            a new adapter, None for the papers'.
        **options: the other arguments of `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The adapted model, in evaluation mode as transformers loads it; all but
        `model.llama_adapter` is frozen, and its `save_pretrained` writes the adapter alone.

    Raises:
        ImportError: transformers is missing.
        FileNotFoundError: there is no such adapter file.
        ValueError: the model is of another type, or the adapter belongs to another base.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(f"{REMEDY} ({error})") from None
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    if isinstance(adapter, str | Path):
        adapt(model, adapter=adapter)
    else:
        settings = asdict(AdapterConfig() if adapter is None else adapter)
        adapt(model, layers=settings.pop("n_layers"), **settings)
    return model
