"""Which models decode, in every form: as made, quantised, in transformers and PEFT, with adapters.

Weights are random but for the bundled base's; what a step takes does not depend on them. Every form
shares the tensors that it does not change, so that all of them fit one GPU side by side.
"""

import copy
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from benchmarks.baselines import wider
from benchmarks.command import installed
from benchmarks.roofline import DTYPES
from llama_adapter.adapter import Adapter
from llama_adapter.adapter_bank import AdapterBank
from llama_adapter.assets import BASE
from llama_adapter.checkpoints import load_base
from llama_adapter.checkpoints.quantize import quantize
from llama_adapter.config import PRESETS, AdapterConfig, LlamaConfig
from llama_adapter.model import Llama
from llama_adapter.quiet import quiet

if TYPE_CHECKING:
    from benchmarks.generate_theirs import Theirs

# what a model is in transformers
THEIRS = ("transformers", "peft")
BUNDLED = "tiny"
CONFIGS: dict[str, LlamaConfig] = {
    "llama-7b": PRESETS["llama-7b"],
    "llama-3-8b": PRESETS["llama-3-8b"],
    "110m": LlamaConfig(
        dim=768, n_layers=12, n_heads=12, vocab_size=32000, multiple_of=32, max_seq_len=1024
    ),
    "25m": LlamaConfig(
        dim=512, n_layers=8, n_heads=8, vocab_size=8192, multiple_of=32, max_seq_len=1024
    ),
    # the reduced form's
    "toy": LlamaConfig(
        dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=128, multiple_of=32, max_seq_len=256
    ),
}
STD = 0.02
# PEFT has one gate a layer, and no activation
SETTINGS = AdapterConfig(gate_scope="layer", gate_activation="identity")


def random_model(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Llama:
    """A frozen model with weights N(0, STD), made where it stays: the host may be too small."""
    with torch.device("meta"):
        model = Llama(config)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=STD, generator=generator)
    return model.requires_grad_(False).eval()


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor itself, or all that a quantised one is packed into."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
    else:
        for name in flatten()[0]:
            yield from plain_tensors(getattr(tensor, name))


def stored_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or of all that a quantised one is packed into."""
    return sum(plain.nbytes for plain in plain_tensors(tensor))


def read_bytes(model: Llama) -> int:
    """Bytes of the weights that a step reads: all, but of a separate embedding a few rows."""
    embedding = model.tok_embeddings.weight
    unread = 0 if model.config.tied_embeddings else stored_bytes(embedding)
    return sum(stored_bytes(parameter) for parameter in model.parameters()) - unread


class Models:
    """One base in all its forms, each made when it is first asked for.

    Attributes:
        device: of all of them.
        base: the model itself.
    """

    def __init__(self, name: str, dtype: str, device: torch.device) -> None:
        """Make the base.

        Args:
            name: BUNDLED or one of CONFIGS.
            dtype: of its weights.
            device: where they are made.
        """
        self.device = device
        if name == BUNDLED:
            self.base = load_base(BASE, dtype=DTYPES[dtype], device=device).model
        else:
            self.base = random_model(CONFIGS[name], DTYPES[dtype], device)
        self._quantized: dict[str, Llama] = {}
        self._banks: dict[tuple[str | None, int], AdapterBank] = {}

    def model(self, weights: str | None) -> Llama:
        """The base with its linear weights in a format of quantize.py, or as they are with None.

        Raises:
            ValueError: the format cannot hold it.
        """
        if weights is None:
            return self.base
        if weights not in self._quantized:
            with torch.device("meta"):
                model = Llama(self.base.config)
            model.load_state_dict(self.base.state_dict(), assign=True)
            quantize(model.requires_grad_(False).eval(), weights)
            self._quantized[weights] = model
        return self._quantized[weights]

    def adapter(self, index: int) -> Adapter:
        """The adapter of a number: prompts N(0, 1), gates of both signs, some above 1."""
        generator = torch.Generator(self.device).manual_seed(index)
        with torch.device(self.device), torch.no_grad():
            adapter = Adapter(SETTINGS, self.base.config, generator=generator)
            adapter.gates.uniform_(-1.5, 1.5, generator=generator)
            # PEFT holds gates in the dtype of the weights
            adapter.gates.copy_(adapter.gates.bfloat16())
        return adapter

    def bank(self, weights: str | None, count: int) -> AdapterBank:
        """A full bank of the adapters 0 to count - 1, by number, of a form of the base."""
        if (weights, count) not in self._banks:
            model = self.model(weights)
            layers = SETTINGS.layers_of(model.config.n_layers)
            bank = AdapterBank(model, capacity=count, layers=layers)
            for index in range(count):
                bank.load(index, self.adapter(index))
            self._banks[weights, count] = bank
        return self._banks[weights, count]

    @cached_property
    def theirs(self) -> "Theirs | None":
        """The base in transformers and PEFT, wearing adapter 0; None where one is missing."""
        if not all(map(installed, THEIRS)):
            return None
        with quiet():
            from benchmarks.generate_theirs import Theirs

            return Theirs(self.base, self.adapter(0))

    def wider_base(self, dtype: torch.dtype = torch.float32) -> Llama:
        """A copy of the base in another dtype; it lives as long as the caller wants."""
        return copy.deepcopy(self.base).to(dtype)

    def wider_theirs(self) -> "Theirs | None":
        """`theirs` in the dtype of the truth; it lives as long as the caller wants."""
        if self.theirs is None:
            return None
        with quiet():
            from benchmarks.generate_theirs import Theirs

            base = self.wider_base(wider(self.base.output_weight.dtype))
            return Theirs(base, self.adapter(0))
