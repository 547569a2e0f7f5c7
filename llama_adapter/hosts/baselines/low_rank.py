"""LoRA, by PEFT."""

from functools import partial

from torch import nn

from llama_adapter.hosts.attention import REMEDY, replace_methods
from llama_adapter.hosts.baselines.parts import Generator, Parameters, Part, Undo, uniform


def lora(
    model: nn.Module, parts: list[Part], rank: int, alpha: int, dropout: float,
    generator: Generator, undo: list[Undo],
) -> Parameters:  # fmt: skip
    """W x + (alpha / rank) B A x in place of W x, for queries and values of every layer.

    A is (rank, C), from ±1/sqrt(C) as torch and PEFT draw it; B is 0 at first.

    Source: LoRA, section 4; rank, alpha and the two projections as in Alpaca-LoRA.

    Raises:
        ImportError: PEFT is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import Linear
    except ImportError as error:
        raise ImportError(
            f"{REMEDY.replace('transformers>=5.10.1', 'peft>=0.18')} ({error})"
        ) from None
    targets = [
        f"{name}.{leaf}"
        for part in parts
        for name in _attention_names(part)
        for leaf in (part.sites.query, part.tower.host.value)
    ]
    undo += [_put_back(model, name) for name in targets]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
    # older PEFT asks newer torchao for classes that it no longer has, unless told the class
    config._register_custom_module({nn.Linear: Linear})
    # what PEFT writes down there
    kept = {"peft_config": model.__dict__.get("peft_config")}
    undo.append(partial(replace_methods, model, kept))
    inject_adapter_in_model(config, model)
    for name in targets:
        model.get_submodule(name).train(model.training)
    parameters = {name: x for name, x in model.named_parameters() if ".lora_" in name}
    for name, parameter in parameters.items():
        parameter.data = parameter.data.float()
        if ".lora_A." in name:
            bound = parameter.shape[1] ** -0.5
            drawn = uniform(tuple(parameter.shape), bound, generator).data
            parameter.data = drawn.to(parameter.device)
    return parameters


def _attention_names(part: Part) -> list[str]:
    names = {id(module): name for name, module in part.tower.model.named_modules()}
    return [names[id(attention)] for attention in part.tower.attentions()]


def _put_back(model: nn.Module, name: str) -> Undo:
    path, _, leaf = name.rpartition(".")
    held = model.get_submodule(path)._modules
    return partial(held.__setitem__, leaf, held[leaf])
