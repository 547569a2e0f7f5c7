"""PEFT's adaption prompts through our kernels: one line before training or generating.

    out = softmax(q k_tokens) v_tokens + gate * softmax(q k_prompt) v_prompt, then o_proj once

PEFT computes the prompt's term outside of the attention: q_proj and v_proj run once more for it,
and so does o_proj, whose bias is thereby added twice. Its gate is one number per layer, no tanh.
"""

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter.hosts.attention import (
    NAME,
    Prompted,
    freeze_during,
    register,
    replace_methods,
    restore_configs,
    separate_configs,
)

MODEL_TYPES = ("llama", "mistral")
REMEDY = "patch needs peft and transformers: pip install 'llama-adapter-kernels[hf]'"
_BEFORE = "_llama_adapter_before"
_METHODS = "_llama_adapter_methods"
# what a rehearsal of two roundings may differ by, and by far less than a wrong formula does
_REHEARSAL_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Patched:
    """What `patch` changed.

    Attributes:
        modules: names of the attention modules in use that run our kernels now.
        adapters: names of the adapters whose modules are patched, switched off or not.
        attention: the attention implementation that `unpatch` restores.
        biased: whether o_proj has a bias, so that PEFT's own results, which add it twice, differ.
    """

    modules: tuple[str, ...]
    adapters: tuple[str, ...]
    attention: str | None
    biased: bool

    def __str__(self) -> str:
        """One line for a log."""
        bias = ", o_proj's bias counted once where PEFT counts it twice" if self.biased else ""
        return (
            f"{len(self.modules)} attention modules of {', '.join(self.adapters)} run through "
            f"{NAME} in the place of {self.attention}{bias}"
        )


def patch(model: nn.Module) -> Patched:
    """Run a PEFT adaption-prompt model's attention through our kernels, on this instance only.

    Results are PEFT's, in training and generation; parameters, their names and files stay PEFT's.
    Projected prompts are kept within one call of generate() and nowhere else. Patching again
    changes nothing, but takes in adapters added since; until then those run PEFT's own code.

    Args:
        model: a LLaMA or Mistral model with adaption prompts, from `get_peft_model` or
            `PeftModel.from_pretrained`; with one adapter or several, in float16, bfloat16 or
            float32. Hooks of accelerate, as `cpu_offload` sets them, come after `patch`.

    Returns:
        What was patched.

    Raises:
        ImportError: peft or transformers is missing or too old.
        ValueError: the model has no adaption prompt, is of a type whose formula is another (GPT-2),
            or its versions compute something we do not know. The model is untouched then.

    Source: PEFT's AdaptedAttention; LLaMA-Adapter, section 3.2, without tanh, one gate per layer.
    """
    tuner = _tuner(model)
    adapted = _all_adapted(tuner)
    _check(tuner, adapted)
    register()
    for module in adapted.values():
        _rehearse(type(module), type(module.model), module.model_type)
    host = tuner.model
    if _BEFORE not in tuner.__dict__:
        tuner.__dict__[_BEFORE] = separate_configs(host)
        tuner.__dict__[_METHODS] = {"generate": host.__dict__.get("generate")}
        freeze_during(host, "generate")
    host.set_attn_implementation(NAME)
    for module in adapted.values():
        _stand_in(module)
    modules = tuple(name for name, module in model.named_modules() if id(module) in adapted)
    names = tuple(tuner.peft_config)
    biased = any(x.model.o_proj.bias is not None for x in adapted.values())
    # the whole model's comes first
    before = tuner.__dict__[_BEFORE][0][1]
    return Patched(modules, names, before._attn_implementation, biased)


def unpatch(model: nn.Module) -> None:
    """Give a patched model back to PEFT's own code, exactly as it was.

    Raises:
        ImportError: peft or transformers is missing.
        ValueError: the model is not patched.
    """
    tuner = _tuner(model)
    if _BEFORE not in tuner.__dict__:
        raise ValueError("model must be patched, got one that patch(model) has not seen")
    for module in _all_adapted(tuner).values():
        module.__dict__.pop("forward", None)
    replace_methods(tuner.model, tuner.__dict__.pop(_METHODS))
    restore_configs(tuner.model, tuner.__dict__.pop(_BEFORE))


@contextmanager
def patched(model: nn.Module) -> Iterator[Patched]:
    """`patch` for the length of a with block, then `unpatch`."""
    report = patch(model)
    try:
        yield report
    finally:
        unpatch(model)


def _tuner(model: nn.Module) -> Any:
    """The part of a PEFT model that holds its adaption prompts."""
    try:
        from peft.tuners.adaption_prompt import AdaptionPromptModel
    except ImportError as error:
        raise ImportError(f"{REMEDY} ({error})") from None
    found = [module for module in model.modules() if isinstance(module, AdaptionPromptModel)]
    if len(found) != 1:
        raise ValueError(
            "model must be a PEFT model with adaption prompts, from get_peft_model(model, "
            f"AdaptionPromptConfig(...)), got {type(model).__name__} with {len(found)} of them"
        )
    return found[0]


def _all_adapted(tuner: Any) -> dict[int, Any]:
    """PEFT's wrappers by id: those in use, and those that wait in its store for their adapter."""
    from peft.tuners.adaption_prompt.layer import _BaseAdaptedAttention

    stored = getattr(tuner, "_cached_adapters", None)
    if not isinstance(stored, dict):
        raise ValueError(f"{_versions()} keeps its adapters where patch does not know of them")
    waiting = [module for modules in stored.values() for module in modules]
    found = [m for m in tuner.modules() if isinstance(m, _BaseAdaptedAttention)]
    return {id(module): module for module in (*found, *waiting)}


def _check(tuner: Any, adapted: dict[int, Any]) -> None:
    kind = tuner.model.config.model_type
    if kind not in MODEL_TYPES:
        reason = ""
        if kind == "gpt2":
            reason = ": PEFT adds GPT-2's prompt after the output projection, another formula"
        raise ValueError(
            f"model must be of type {' or '.join(MODEL_TYPES)}, got {kind} "
            f"({type(tuner.model).__name__}){reason}"
        )
    if not adapted:
        raise ValueError("model must have attention modules with adaption prompts, got none")
    if tuner.model.config._attn_implementation == NAME and _BEFORE not in tuner.__dict__:
        raise ValueError(
            f"model must not run {NAME} yet, got one that adapt(model) has adapted: undo that first"
        )
    for module in adapted.values():
        forward = module.__dict__.get("forward")
        if forward is not None and not isinstance(forward, Prompted):
            raise ValueError(
                "model must have no hooks on its attention, as cpu_offload sets them: patch first"
            )
        dtype = module.model.k_proj.weight.dtype
        if dtype == torch.float64:
            raise ValueError(f"model must be float16, bfloat16 or float32, got {dtype}")
        width = getattr(module.model, "head_dim", 0)
        if width % 8 or not 8 <= width <= 256:
            raise ValueError(
                f"model must have heads of 8 to 256 channels in steps of 8, got {width}"
            )


def _source(adapted: Any) -> tuple[Tensor, Tensor]:
    """Rows (P, C) and PEFT's one gate for all heads (H,)."""
    heads = adapted.model.config.num_attention_heads
    return adapted.adaption_prompt[0], adapted.adaption_gate.float().expand(heads)


def _trained(adapted: Any) -> tuple[Tensor, Tensor]:
    return adapted.adaption_prompt, adapted.adaption_gate


def _stand_in(adapted: Any) -> None:
    inner = adapted.model
    if not isinstance(adapted.__dict__.get("forward"), Prompted):
        # the inner module is called, not its forward, so that its hooks run as under PEFT
        adapted.__dict__["forward"] = Prompted(
            inner, inner, partial(_source, adapted), partial(_trained, adapted),
            "k_proj", "v_proj", inner.head_dim,
        )  # fmt: skip


def _versions() -> str:
    names = ("peft", "transformers")
    return " with ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


@cache
def _rehearse(wrapper: type, attention: type, model_type: str) -> None:
    """Raise unless these classes, made small, give the same with and without the patch.

    Versions change what they compute; a gate of 0, as at the start of training, would hide it.
    """
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(model_type, **sizes)
    try:
        plain = torch.autocast("cpu", enabled=False)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"), plain:
            torch.manual_seed(0)
            small = wrapper(model_type, 3, attention(config, 0)).eval().float()
            small.adaption_gate.fill_(1.5)
            hidden, angles = (torch.randn(*x, dtype=torch.float32) for x in ((2, 5, 32), (1, 5, 8)))
            given = {
                "hidden_states": hidden,
                "position_embeddings": (angles.cos(), angles.sin()),
                "attention_mask": None,
            }
            # without a mask this is the causal one, which eager would not add
            config._attn_implementation = "sdpa"
            expected = small(**given)[0]
            config._attn_implementation = NAME
            _stand_in(small)
            got = small(**given)[0]
        different = float((got - expected).abs().max())
    except (AttributeError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{_versions()} cannot be patched, nothing was changed: {error!r}"
        ) from None
    if not different < _REHEARSAL_TOLERANCE:
        raise ValueError(
            f"{_versions()} cannot be patched, nothing was changed: its adaption prompts differ by "
            f"{different:.1e} from the formula that patch knows"
        )
