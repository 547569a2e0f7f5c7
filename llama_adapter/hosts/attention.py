"""Our kernels under transformers' attention interface, with the prompt of the layer that calls.

`Prompted` stands in for the forward of one attention module: it projects the layer's prompt and
hands it down as a keyword, which every attention of transformers passes on to the function that
`register` put under the name NAME. So nothing but the call carries the prompt, and a module that is
switched off, or shared by several adapters, has none to forget.
"""

import copy
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapter_kernels import (
    gated_prompt_attention,
    zero_init_attention,
    zero_init_attention_decode,
)
from llama_adapter.adapter import LayerPrompt

# without "flash" and "/": transformers reads a meaning into both
NAME = "llama_adapter"
KEYWORD = "llama_adapter_prompt"
_BOUNDS = "llama_adapter_bounds"
# accelerate's, on a module that it moves tensors for
_HOOK = "_hf_hook"
REMEDY = "the integrations with Hugging Face need transformers: pip install 'transformers>=5.10.1'"


class Bounds(NamedTuple):
    """(B,) int32 each: the keys of a sequence that are no padding."""

    key_starts: Tensor
    key_lengths: Tensor


class _Ride(NamedTuple):
    """What rides on a mask: its bounds, whether it is causal besides, and its version then."""

    bounds: Bounds
    causal: bool
    version: int


def register() -> None:
    """Put our attention and its mask into transformers' tables, under NAME; again changes nothing.

    Raises:
        ImportError: transformers is not installed, or is too old to have the tables.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(f"{REMEDY} ({error})") from None
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def mask(q_length: int, kv_length: int, **kwargs: Any) -> Tensor | None:
    """The mask of transformers' sdpa, which also knows its bounds where padding is all it hides.

    Returns:
        None where plain attention is meant, causal or not as the module is, else (B, 1, T, S) bool,
        True where a key is seen. The bounds ride on the mask as an attribute; whoever loses them
        gets the same numbers from the mask itself, and so does a mask that was written to since. In
        torch's inference mode, where tensors count no writes, a write is not seen.
    """
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        sdpa_mask,
    )

    made = sdpa_mask(q_length=q_length, kv_length=kv_length, **kwargs)
    padding, offset = kwargs.get("attention_mask"), kwargs.get("q_offset", 0)
    function = kwargs.get("mask_function")
    causal = function is causal_mask_function
    if (
        # whether there are holes is for the data to say, which a graph cannot ask
        torch.compiler.is_compiling()
        or made is None
        or padding is None
        or not (causal or function is bidirectional_mask_function)
        or padding.shape[-1] != kv_length
        or kwargs.get("kv_offset", 0) != 0
        # our diagonal ends at the last key; a static cache goes on, and counts in a tensor
        or (causal and (not isinstance(offset, int) or kv_length - q_length != offset))
    ):
        return made
    bounds = _bounds(padding.bool())
    if bounds is not None:
        setattr(made, _BOUNDS, _Ride(bounds, causal, _version(made)))
    return made


def _bounds(padding: Tensor) -> Bounds | None:
    """First and one past the last True of each row (B, S); None where a row has a hole."""
    count = padding.sum(-1)
    starts = padding.int().argmax(-1)
    lengths = padding.shape[-1] - padding.flip(-1).int().argmax(-1)
    lengths = torch.where(count > 0, lengths, starts)
    if bool((lengths - starts != count).any()):
        return None
    return Bounds(starts.int(), lengths.int())


def _ride_of(attention_mask: Tensor | None) -> _Ride | None:
    """What rides on a mask, if that is still what it was taken from."""
    found: _Ride | None = getattr(attention_mask, _BOUNDS, None)
    if attention_mask is None or found is None or found.version != _version(attention_mask):
        return None
    return found


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, plus the gated prompt that came with the call.

    Causal and bidirectional attention, padded or not, goes to `zero_init_attention`, a generated
    token to its form for decoding. What that does not do (sliding windows, dropout, any other mask,
    a static cache) goes to transformers' own sdpa, and the prompt is added by
    `gated_prompt_attention`; the prompt's own probabilities are never dropped.

    Args:
        module: the attention that calls.
        query: (B, H, T, D).
        key, value: (B, G, S, D), cached ones included.
        attention_mask: what `mask` made, or any mask that sdpa takes.
        dropout: of the probabilities.
        scaling: of the scores; None is D ** -0.5.
        is_causal: overrides the module's own.
        **kwargs: the prompt under KEYWORD, and what sdpa takes besides.

    Returns:
        (B, T, H, D) and None for the probabilities, which no kernel writes down.
    """
    prompt: LayerPrompt | None = kwargs.pop(KEYWORD, None)
    segment = () if prompt is None else (prompt.k, prompt.v, prompt.gate)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    ride = _ride_of(attention_mask)
    if kwargs.get("output_attentions"):
        warnings.warn(
            "an adapted model does not give output_attentions: no kernel writes probabilities down",
            stacklevel=2,
        )
    tokens, keys = query.shape[2], key.shape[2]
    q = query.transpose(1, 2)
    ours = dropout == 0 and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    ours = ours and kwargs.get("position_bias") is None
    if ours and (attention_mask is None or ride is not None):
        if attention_mask is None and causal and 1 < tokens < keys:
            # an empty static cache: sdpa's diagonal starts at the first key
            key, value = key[:, :, :tokens], value[:, :, :tokens]
        k, v = key.transpose(1, 2), value.transpose(1, 2)
        if attention_mask is None and tokens == 1 and not torch.is_grad_enabled():
            # the newest token of a cache sees all of it
            lengths = torch.full((len(q),), keys, dtype=torch.int32, device=q.device)
            out = zero_init_attention_decode(
                q, k, v, *segment, cache_lengths=lengths, scale=scaling
            )
            return out, None
        limits = {} if ride is None else ride.bounds._asdict()
        causal = causal and tokens > 1 if ride is None else ride.causal
        out = zero_init_attention(q, k, v, *segment, causal=causal, scale=scaling, **limits)
        return out, None
    from transformers import AttentionInterface

    theirs = AttentionInterface()["sdpa"]
    out, _ = theirs(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
        is_causal=is_causal, **kwargs,
    )  # fmt: skip
    return (gated_prompt_attention(q, *segment, scale=scaling, out=out) if segment else out), None


class Prompted:
    """Takes the place of an attention module's forward, with the layer's prompt.

    Attributes:
        attention: the module, whose configuration says which attention runs.
        forward: what it ran before.
        source: gives the prompt rows (P, C) and the gate multipliers (H,) float32, of now; or in
            place of the rows keys and values (2, P, G D).
        trained: gives the parameters that those come from.
        key, value: names of the attention's frozen projections, looked up at each call.
        head_dim: D.
        keeper: the thread whose projected prompts may be kept, as `_frozen` sets it.
    """

    def __init__(
        self,
        attention: nn.Module,
        forward: Callable[..., Any],
        source: Callable[[], tuple[Tensor, Tensor]],
        trained: Callable[[], tuple[Tensor, Tensor]],
        key: str,
        value: str,
        head_dim: int,
    ) -> None:
        self.attention, self.forward = attention, forward
        self.source, self.trained = source, trained
        self.key, self.value, self.head_dim = key, value, head_dim
        self.keeper: int | None = None
        self._kept: tuple[object, LayerPrompt] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy in another process finds our attention there, too."""
        self.__dict__.update(state)
        register()

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attend from (B, T, C) hidden states, as the module itself does.

        Raises:
            RuntimeError: the model's attention was switched to another, which knows no prompt, or
                this is a copy of the module on another device.
        """
        used = getattr(self.attention.config, "_attn_implementation", None)
        if used != NAME:
            raise RuntimeError(
                f"the adapted model must keep attn_implementation {NAME!r}, got {used!r}: undo the "
                "adapter (unpatch, unadapt) before choosing another"
            )
        return self.forward(hidden_states, *args, **{KEYWORD: self.prompt(hidden_states)}, **kwargs)

    def prompt(self, like: Tensor) -> LayerPrompt:
        """Keys, values and gate, differentiable in the prompt, in the dtype of `like`."""
        keep = self.keeper is not None and not torch.is_grad_enabled()
        # asked second, as a graph cannot ask it
        keep = keep and self.keeper == threading.get_ident()
        state = tuple((id(x), _version(x)) for x in self.trained()) if keep else None
        if self._kept is not None and keep and self._kept[0] == state:
            return self._kept[1]
        rows, gate = self.source()
        key, value = (self.attention.get_submodule(name) for name in (self.key, self.value))
        device, heads = device_of(key), (-1, self.head_dim)
        # accelerate moves what it hands to a layer; DataParallel copies the layer, and not this
        if device.type == "meta" or (device != like.device and not hasattr(self.attention, _HOOK)):
            raise RuntimeError(
                f"the adapted layer must be on {like.device} as its input is, got {device}: "
                "offloaded weights and DataParallel are not supported; torchrun runs a process "
                "per GPU"
            )
        rows, gate = rows.to(device, like.dtype), gate.to(device)
        pair = (key(rows), value(rows)) if rows.ndim == 2 else rows.unbind()
        k, v = (x.unflatten(-1, heads) for x in pair)
        made = LayerPrompt(k, v, gate)
        if keep:
            self._kept = state, made
        return made

    def keep(self, keeps: bool) -> None:
        """Allow this thread to keep, or forbid it and forget."""
        self.keeper, self._kept = threading.get_ident() if keeps else None, None


def _version(x: Tensor) -> int:
    """How often x was written to in place; memory of inference does not count."""
    return -1 if x.is_inference() else x._version


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are; "meta" where accelerate keeps them elsewhere."""
    return next(module.parameters()).device


def separate_configs(model: nn.Module) -> list[tuple[Any, Any]]:
    """Give a model and its modules configurations of their own.

    Returns:
        Pairs of the new ones and those that others may share, for `restore_configs`.
    """
    # one memory for all: a part's configuration stays the same object inside the whole's
    memory: dict[int, Any] = {}
    pairs: dict[int, tuple[Any, Any]] = {}
    for module in model.modules():
        shared = module.__dict__.get("config")
        if shared is not None:
            module.config = copy.deepcopy(shared, memory)
            pairs[id(shared)] = module.config, shared
    return list(pairs.values())


def restore_configs(model: nn.Module, pairs: list[tuple[Any, Any]]) -> None:
    """Undo `separate_configs`."""
    before = {id(new): old for new, old in pairs}
    for module in model.modules():
        config = module.__dict__.get("config")
        if id(config) in before:
            module.config = before[id(config)]


def prompted(model: nn.Module) -> list[Prompted]:
    """Those that stand in for a forward of the model's modules now."""
    found = [module.__dict__.get("forward") for module in model.modules()]
    return [forward for forward in found if isinstance(forward, Prompted)]


def _frozen(model: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call in which no parameter changes: every prompt is projected once, and then forgotten."""
    stand_ins = prompted(model)
    for stand_in in stand_ins:
        stand_in.keep(True)
    try:
        return call(*args, **kwargs)
    finally:
        for stand_in in stand_ins:
            stand_in.keep(False)


def freeze_during(model: nn.Module, name: str) -> None:
    """Let the model's method `name` project each prompt once per call, on this instance only."""
    call = getattr(model, name, None)
    if call is not None:
        model.__dict__[name] = partial(_frozen, model, call)


def replace_methods(model: nn.Module, before: dict[str, Any]) -> None:
    """Give the instance back methods that it had of its own, None where it had none."""
    for name, method in before.items():
        model.__dict__.pop(name, None)
        if method is not None:
            model.__dict__[name] = method
