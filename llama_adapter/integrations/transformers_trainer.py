"""transformers' Trainer for adapted models: it finds the checkpoints that hold an adapter alone.

A checkpoint of an adapted model is `adapter.safetensors` beside the optimiser's and the scheduler's
states. transformers looks for the weights of a whole model there, in two methods that
`AdapterCheckpoints` replaces; everything else of training stays theirs.
"""

from pathlib import Path
from typing import Any

from llama_adapter.hosts import adapter_of
from llama_adapter.hosts.attention import REMEDY
from llama_adapter.hosts.files import FILE, load_adapted

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError(f"{REMEDY} ({error})") from None

__all__ = ["AdapterCheckpoints", "AdapterTrainer"]


class AdapterCheckpoints:
    """Goes before a Trainer in a class's bases, of transformers or made from it, such as TRL's.

    `train(resume_from_checkpoint=...)` and `load_best_model_at_end` then read the adapter of an
    adapted model. Models without an adapter, and checkpoints of whole models, are the Trainer's own
    affair as before.
    """

    # what a Trainer has
    model: Any
    state: Any

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        host = self.model if model is None else model
        if adapter_of(host) is None or not (Path(resume_from_checkpoint) / FILE).is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # pyright: ignore[reportAttributeAccessIssue]
            return
        load_adapted(host, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if adapter_of(self.model) is None or not (Path(best) / FILE).is_file():
            super()._load_best_model()  # pyright: ignore[reportAttributeAccessIssue]
            return
        load_adapted(self.model, best)


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """transformers' Trainer, which also resumes adapted models and loads the best one at the end.

    Its arguments are those of `transformers.Trainer`.
    """
