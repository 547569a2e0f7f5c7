"""Many adapters in one model: a bank of projected prompts that sequences of a batch choose from.

Every adapter is a row of the bank's tensors. A row that a sequence uses is never written, so an
adapter can be replaced or unloaded while requests run: they finish on what they began with.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from llama_adapter.adapter import Adapter, LayerPrompt, Prompts
from llama_adapter.model import Llama


class UnknownAdapter(ValueError):
    """A name that no adapter of a bank bears."""


class BankFull(ValueError):
    """A bank has no row for one more adapter."""


class Bank(Protocol):
    """Where an engine finds a request's adapter."""

    prompts: Prompts

    def acquire(self, name: Hashable) -> int:
        """The row of an adapter, which stays as it is until `release`; ValueError if unknown."""
        ...

    def release(self, row: int) -> None:
        """One user less of a row."""
        ...


class AdapterBank:
    """Adapters by name, projected into the rows of preallocated tensors.

    An adapter of 30 layers and 10 prompt rows takes 4.9 MB of a 7B model's 16-bit memory.

    Attributes:
        prompts: the bank's tensors, k and v (A, P, G, D) and gate (A, H) per layer, and the prompt
            length (A,) of every row; without `adapter_index`, which belongs to a batch.
        capacity: rows A.
    """

    def __init__(
        self,
        model: Llama,
        *,
        capacity: int,
        prompt_length: int = 10,
        layers: Sequence[int] | None = None,
    ) -> None:
        """Allocate an empty bank.

        Args:
            model: what the adapters belong to.
            capacity: adapters A that fit, counting those replaced or unloaded but still in use.
                One that requests use is replaced through a row to spare.
            prompt_length: P, of the longest adapter.
            layers: that an adapter may adapt; default all.

        Raises:
            ValueError: capacity or prompt_length is below 1, or a layer is not the model's.
        """
        for name, value in (("capacity", capacity), ("prompt_length", prompt_length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        config, weight = model.config, model.output_weight
        wanted = range(config.n_layers) if layers is None else sorted(set(layers))
        if not all(0 <= layer < config.n_layers for layer in wanted):
            raise ValueError(f"layers must be below {config.n_layers}, got {list(wanted)}")
        shape = (capacity, prompt_length, config.kv_heads, config.head_dim)
        segments = {}
        for layer in wanted:
            k, v = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in "kv")
            gate = torch.zeros(capacity, config.n_heads, device=weight.device)
            segments[layer] = LayerPrompt(k, v, gate)
        self.capacity, self._model, self._longest = capacity, model, prompt_length
        self._lengths = torch.zeros(capacity, dtype=torch.int32, device=weight.device)
        self.prompts = Prompts(segments, None, self._lengths)
        self._rows: dict[Hashable, int] = {}
        self._free = list(range(capacity - 1, -1, -1))
        # users of a row; the name that leads to it is one of them
        self._users = [0] * capacity

    @property
    def names(self) -> list[Hashable]:
        """The adapters that new requests can name."""
        return list(self._rows)

    # tensors made in inference mode can be written in it alone, and others as well
    @torch.inference_mode()
    def load(self, name: Hashable, adapter: Adapter) -> None:
        """Project an adapter under a name; one that bears it already is replaced for new requests.

        Raises:
            BankFull: every row is in use.
            ValueError: the adapter does not fit the model or the bank, or the name is None, which
                stands for the base model.
        """
        if name is None:
            raise ValueError("name must not be None, which stands for the base model")
        if not isinstance(adapter, Adapter):
            raise ValueError(
                f"adapter {name!r} must be an Adapter, as load_adapter reads one, got "
                f"{type(adapter).__name__}"
            )
        self._check(name, adapter)
        projected = self._model.project(adapter).layers
        old = self._rows.get(name)
        if old is not None and self._users[old] == 1:
            # the name is its only user
            self._free.append(old)
            self._users[old] = 0
            del self._rows[name]
            old = None
        if not self._free:
            raise BankFull(
                f"the bank must have a free row for adapter {name!r}, got {self.capacity} of "
                f"{self.capacity} in use: unload one, wait for its requests, or raise capacity"
            )
        row, length = self._free[-1], adapter.prompts.shape[1]
        for layer, held in self.prompts.layers.items():
            new = projected.get(layer)
            # what an earlier adapter left would be seen with any gate, were it no number
            for tensor in (held.k, held.v, held.gate):
                tensor[row] = 0.0
            if new is not None:
                held.k[row, :length] = new.k
                held.v[row, :length] = new.v
                held.gate[row] = new.gate
        self._lengths[row] = length
        # only now, so that a failure above loses no row
        self._free.pop()
        self._users[row] = 1
        self._rows[name] = row
        if old is not None:
            self.release(old)

    def _check(self, name: Hashable, adapter: Adapter) -> None:
        """Raise unless an adapter belongs to the model's shape and to the bank."""
        config = self._model.config
        if adapter.tuning.groups:
            raise ValueError(
                f"adapter {name!r} must have prompts and gates alone, got "
                f"{', '.join(adapter.tuning.groups)}: those change the layers of a whole batch, "
                "whose adapters a bank mixes; run it by itself, with prompts of Llama.project"
            )
        length, dim = adapter.prompts.shape[1:]
        if (dim, adapter.n_heads) != (config.dim, config.n_heads):
            raise ValueError(
                f"adapter {name!r} must be of a model of dim {config.dim} and {config.n_heads} "
                f"heads, got dim {dim} and {adapter.n_heads} heads"
            )
        if length > self._longest:
            raise ValueError(
                f"adapter {name!r} must have a prompt length of at most {self._longest}, as the "
                f"bank was made for, got {length}"
            )
        others = [layer for layer in adapter.layers if layer not in self.prompts.layers]
        if others:
            raise ValueError(
                f"adapter {name!r} must adapt layers among {list(self.prompts.layers)}, "
                f"got {others[0]}"
            )

    def unload(self, name: Hashable) -> None:
        """Take an adapter from new requests; its row is free when the last running one ends.

        Raises:
            UnknownAdapter: there is no such adapter.
        """
        row = self._row(name)
        del self._rows[name]
        self.release(row)

    def _row(self, name: Hashable) -> int:
        row = self._rows.get(name)
        if row is None:
            known = ", ".join(repr(one) for one in list(self._rows)[:8]) or "none is loaded"
            known += ", ..." if len(self._rows) > 8 else ""
            raise UnknownAdapter(f"adapter must be one of the bank's ({known}), got {name!r}")
        return row

    def acquire(self, name: Hashable) -> int:
        """The row of an adapter, which stays as it is until `release`.

        Raises:
            UnknownAdapter: there is no such adapter.
        """
        row = self._row(name)
        self._users[row] += 1
        return row

    def release(self, row: int) -> None:
        """One user less of a row; without any it is free."""
        self._users[row] -= 1
        if self._users[row] == 0:
            self._free.append(row)


class RowBank:
    """Projected prompts of a batch as a bank whose adapters are the batch's row numbers.

    Attributes:
        prompts: as a bank's, whichever of the three forms they came in.
    """

    def __init__(self, prompts: Prompts, batch: int) -> None:
        """Take prompts over, without a copy.

        Args:
            prompts: shared, one per row, or a bank with `adapter_index`.
            batch: rows B.

        Raises:
            ValueError: they belong to another number of rows, or biases, scales or norms come
                or images come with a bank.
        """
        index, layers = prompts.adapter_index, prompts.layers
        if index is not None:
            if prompts.tuned is not None or prompts.visual:
                raise ValueError(
                    "adapter_index must be None with an adapter's bias, scale or norm, or images"
                )
            if tuple(index.shape) != (batch,):
                raise ValueError(
                    f"adapter_index must have shape (B,) = ({batch},), got {tuple(index.shape)}"
                )
            self._rows = index.tolist()
            self.prompts = Prompts(layers, None, prompts.prompt_lengths)
            return
        # one layer's segment may be shared and another's not
        single = all(prompt.k.ndim == 3 for prompt in layers.values()) and not prompts.visual
        self._rows = [0] * batch if single else list(range(batch))
        rows = 1 if single else batch
        banked, images = (
            {n: _rows_of(n, p, rows) for n, p in held.items()} for held in (layers, prompts.visual)
        )
        self.prompts = replace(prompts, layers=banked, visual=images)

    def acquire(self, name: Hashable) -> int:
        """The bank's row of a row of the batch."""
        assert isinstance(name, int)
        return self._rows[name]

    def release(self, row: int) -> None:
        """Nothing is ever written here."""


def _rows_of(layer: int, prompt: LayerPrompt, rows: int) -> LayerPrompt:
    """A shared prompt, or one of every row, in a bank's form."""

    def banked(x: Tensor, bare: int) -> Tensor:
        return x if x.ndim > bare else x.expand(rows, *x.shape)

    k, v, gate = banked(prompt.k, 3), banked(prompt.v, 3), banked(prompt.gate, 1)
    if len(k) != rows:
        raise ValueError(f"prompts of layer {layer} must be for B = {rows} texts, got {len(k)}")
    return LayerPrompt(k, v, gate)
