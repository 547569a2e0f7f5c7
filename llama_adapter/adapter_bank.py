"""Many adapters in one model: a bank of projected prompts that sequences of a batch choose from.

Every adapter is a row of the bank's tensors, and so is an adapter with an image, for the request
that it belongs to. A row that a sequence uses is never written, so an adapter can be replaced or
unloaded while requests run: they finish on what they began with.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from llama_adapter.adapter import Adapter, LayerPrompt, Prompts
from llama_adapter.config import EARLY_TOKENS
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

    def check_image(self, row: int, features: Tensor) -> None:
        """Raise ValueError unless an adapter's row takes features (F,) of an image."""
        ...

    def see(self, row: int, features: Tensor) -> int:
        """A row of an adapter's with an image, until `release`; BankFull if there is none left."""
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
        visual_layers: int = 0,
        visual_tokens: int = EARLY_TOKENS,
    ) -> None:
        """Allocate an empty bank.

        Args:
            model: what the adapters belong to.
            capacity: adapters A that fit, counting those replaced or unloaded but still in use, and
                every running request with an image. One that requests use is replaced through a row
                to spare.
            prompt_length: P, of the longest adapter.
            layers: that an adapter may adapt; default all.
            visual_layers: K, the most layers that see images fused early; 0 leaves room for none.
            visual_tokens: P_v, tokens of an image of every adapter with early fusion.

        Raises:
            ValueError: a number is too small, or a layer is not the model's.
        """
        for name, value in (
            ("capacity", capacity),
            ("prompt_length", prompt_length),
            ("visual_tokens", visual_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= visual_layers <= model.config.n_layers:
            raise ValueError(
                f"visual_layers must be from 0 to {model.config.n_layers}, got {visual_layers}"
            )
        config, weight = model.config, model.output_weight
        wanted = range(config.n_layers) if layers is None else sorted(set(layers))
        if not all(0 <= layer < config.n_layers for layer in wanted):
            raise ValueError(f"layers must be below {config.n_layers}, got {list(wanted)}")

        def empty(layers: Iterable[int], length: int) -> dict[int, LayerPrompt]:
            shape = (capacity, length, config.kv_heads, config.head_dim)
            found = {}
            for layer in layers:
                k, v = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in "kv")
                gate = torch.zeros(capacity, config.n_heads, device=weight.device)
                found[layer] = LayerPrompt(k, v, gate)
            return found

        self.capacity, self._model, self._longest = capacity, model, prompt_length
        self._lengths = torch.zeros(capacity, dtype=torch.int32, device=weight.device)
        # a row's image is in the same row of the tensors of images
        self._images = torch.full_like(self._lengths, -1) if visual_layers else None
        self._visual = (visual_layers, visual_tokens)
        self.prompts = Prompts(
            empty(wanted, prompt_length),
            None,
            self._lengths,
            visual=empty(range(visual_layers), visual_tokens),
            visual_index=self._images,
        )
        # of each row in use, for its images
        self._adapters: dict[int, Adapter] = {}
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

        An adapter that takes images is kept, for those of later requests: load it again once its
        parameters have changed.

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
        projected = self._model.project(adapter)
        old = self._rows.get(name)
        if old is not None and self._users[old] == 1:
            # the name is its only user
            self.release(old)
            del self._rows[name]
            old = None
        if not self._free:
            raise BankFull(
                f"the bank must have a free row for adapter {name!r}, got {self.capacity} of "
                f"{self.capacity} in use: unload one, wait for its requests, or raise capacity"
            )
        row = self._free[-1]
        self._write(row, adapter, projected)
        # only now, so that a failure above loses no row
        self._free.pop()
        self._users[row] = 1
        self._rows[name] = row
        if old is not None:
            self.release(old)

    def _write(self, row: int, adapter: Adapter, projected: Prompts) -> None:
        """Fill a free row with an adapter, and with its image if there is one."""
        held = ((self.prompts.layers, projected.layers), (self.prompts.visual, projected.visual))
        for segments, given in held:
            for layer, segment in segments.items():
                # what an earlier adapter left would be seen with any gate, were it no number
                for tensor in (segment.k, segment.v, segment.gate):
                    tensor[row] = 0.0
                new = given.get(layer)
                if new is not None:
                    length = new.k.shape[-3]
                    segment.k[row, :length] = new.k
                    segment.v[row, :length] = new.v
                    segment.gate[row] = new.gate
        self._lengths[row] = adapter.prompts.shape[1]
        if self._images is not None:
            self._images[row] = row if projected.visual else -1
        self._adapters[row] = adapter

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
        seen = None if adapter.projector is None else adapter.projector.config
        if (
            seen is not None
            and seen.layers
            and not (seen.layers <= self._visual[0] and seen.tokens == self._visual[1])
        ):
            raise ValueError(
                f"adapter {name!r} must fuse images late, or {self._visual[1]} tokens in at most "
                f"{self._visual[0]} layers, as the bank was made for, got {seen.tokens} in "
                f"{seen.layers}"
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

    def check_image(self, row: int, features: Tensor) -> None:
        """Raise unless an adapter takes features of an image.

        Args:
            row: of `acquire`.
            features: (F,) of an image.

        Raises:
            ValueError: it takes no images, or other features.
        """
        projector = self._adapters[row].projector
        if projector is None:
            raise ValueError("image must be None: the adapter takes no images")
        wanted = projector.config.features
        if not isinstance(features, Tensor) or tuple(features.shape) != (wanted,):
            got = tuple(features.shape) if isinstance(features, Tensor) else features
            raise ValueError(f"image must be features (F,) = ({wanted},) of one, got {got!r}")

    @torch.inference_mode()
    def see(self, row: int, features: Tensor) -> int:
        """An adapter with an image, in a row of its own until `release`.

        Args:
            row: of `acquire`, which the image's does not depend on any more.
            features: (F,) of the image.

        Raises:
            BankFull: every row is in use.
            ValueError: the adapter takes no images, or other features.
        """
        self.check_image(row, features)
        if not self._free:
            raise BankFull(
                f"the bank must have a free row for an image, got {self.capacity} of "
                f"{self.capacity} in use: raise capacity"
            )
        adapter, own = self._adapters[row], self._free[-1]
        tokens = adapter.visual_tokens(features[None].to(adapter.prompts.device))
        self._write(own, adapter, self._model.project(adapter, tokens))
        self._free.pop()
        self._users[own] = 1
        return own

    def release(self, row: int) -> None:
        """One user less of a row; without any it is free."""
        self._users[row] -= 1
        if self._users[row] == 0:
            self._free.append(row)
            del self._adapters[row]


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

    def check_image(self, row: int, features: Tensor) -> None:
        """Images are in the prompts already."""
        raise ValueError("image must be None with prompts of rows")

    def see(self, row: int, features: Tensor) -> int:
        """As `check_image`."""
        raise ValueError("image must be None with prompts of rows")

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


def checked_bank(prompts: Prompts, model: Llama) -> Prompts:
    """A bank's prompts, once they are known to be for this model."""
    config, weight = model.config, model.output_weight
    inner = (config.kv_heads, config.head_dim)
    for layer, prompt in (*prompts.layers.items(), *prompts.visual.items()):
        shapes = {tuple(x.shape[2:]) for x in (prompt.k, prompt.v)}
        kinds = {(x.dtype, x.device) for x in (prompt.k, prompt.v)}
        fits = shapes == {inner} and prompt.gate.shape[1:] == (config.n_heads,)
        if not fits or layer >= config.n_layers or kinds != {(weight.dtype, weight.device)}:
            raise ValueError(
                f"bank must be of this model, {config.describe()}, {weight.dtype} on "
                f"{weight.device}; got another's prompts in layer {layer}: keys "
                f"{tuple(prompt.k.shape)}, {prompt.k.dtype} on {prompt.k.device}"
            )
    return prompts
