"""Where the multi-modal benchmark keeps its task and its frozen models, made once."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.multimodal_models import (
    BASE_SHAPE,
    image_processor,
    train_base,
    train_encoder,
    train_tokenizer,
)
from benchmarks.multimodal_task import SEED, write_task
from benchmarks.multimodal_world import facts
from llama_adapter.checkpoints.atomic import write_atomically
from llama_adapter.model import Llama
from llama_adapter.tokenizer import Tokenizer

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How large task and pre-training are.

    Attributes:
        train, test: questions.
        base_steps, encoder_steps: of pre-training.
    """

    train: int
    test: int
    base_steps: int
    encoder_steps: int


@dataclass(frozen=True)
class Workplace:
    """The folder in which the task, the frozen models and the features are."""

    folder: Path

    @property
    def task(self) -> Path:
        """ScienceQA's files."""
        return self.folder / "task"

    @property
    def problems(self) -> Path:
        """All questions."""
        return self.task / "problems.json"

    @property
    def splits(self) -> Path:
        """Which questions a split has."""
        return self.task / "pid_splits.json"

    @property
    def images(self) -> Path:
        """The pictures."""
        return self.task / "images"

    @property
    def base(self) -> Path:
        """The language model, as Meta keeps one."""
        return self.folder / "base"

    @property
    def encoder(self) -> Path:
        """The vision encoder, as transformers saves one."""
        return self.folder / "encoder"

    @property
    def features(self) -> Path:
        """Features of the pictures."""
        return self.folder / "features"

    def make(self, sizes: Sizes, say: Callable[[str], None] = print) -> Row:
        """Write the task and train both models, unless the folder holds them from before.

        Args:
            sizes: of them.
            say: told what happens.

        Returns:
            Processor seconds of each part, as they were when it was made.
        """
        done, identity = self.folder / "made.json", {"sizes": asdict(sizes), "code": _code()}
        if done.is_file():
            held = json.loads(done.read_text(encoding="utf-8"))
            if held["identity"] == identity:
                return held["processor_seconds"]
        # nothing but what is made here: the folder may hold more
        for part in (self.task, self.base, self.encoder, self.features):
            shutil.rmtree(part, ignore_errors=True)
        spent: Row = {}
        for name, make in (
            ("task", self._make_task),
            ("base", self._make_base),
            ("encoder", self._make_encoder),
        ):
            say(f"making the {name}")
            start = time.process_time()
            make(sizes)
            spent[name] = round(time.process_time() - start, 1)
        content = {"identity": identity, "processor_seconds": spent}
        write_atomically(done, (json.dumps(content, indent=1) + "\n").encode())
        return spent

    def _make_task(self, sizes: Sizes) -> None:
        write_task(self.task, {"train": sizes.train, "test": sizes.test})

    def _make_base(self, sizes: Sizes) -> None:
        self.base.mkdir(parents=True)
        world = facts(SEED)
        (self.base / "tokenizer.model").write_bytes(train_tokenizer(world))
        tokenizer = Tokenizer(self.base / "tokenizer.model")
        _save(train_base(tokenizer, world, sizes.base_steps), self.base)

    def _make_encoder(self, sizes: Sizes) -> None:
        train_encoder(sizes.encoder_steps).save_pretrained(self.encoder)
        image_processor().save_pretrained(self.encoder)


def _save(model: Llama, folder: Path) -> None:
    """Write consolidated.00.pth and params.json."""
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    torch.save(weights, folder / "consolidated.00.pth")
    params = {**BASE_SHAPE, "vocab_size": model.config.vocab_size}
    (folder / "params.json").write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")


def _code() -> str:
    """Digest of the code that decides what is made."""
    here = Path(__file__).parent
    names = ("multimodal_world.py", "multimodal_task.py", "multimodal_models.py")
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in names)).hexdigest()[:16]
