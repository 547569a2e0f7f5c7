"""Quantisation of a frozen base: which weights, in which format, and what is refused.

torchao packs the weights and multiplies by them, for fp8 torch does. Embeddings, norms and the
adapter stay as they are, and so do activations, but for fp8's products, which round both sides.
It happens in place: the weights as read are gone afterwards.
"""

import importlib
import math
from types import ModuleType
from typing import Any

import torch
from torch import nn

from llama_adapter.float8 import MULTIPLE, Float8Weight
from llama_adapter.layers import Linear
from llama_adapter.model import Llama
from llama_adapter.quiet import quiet

# a format to the dtypes of the bases that it can hold: torchao multiplies int8 by its scale last,
# so that 516 products of 1 and 127 overflow float16, where 128 over a small difference of nf4's
# scales does too; its int4 kernel is bfloat16's, and so is torch's product of 8-bit floats by row
FORMATS: dict[str, tuple[torch.dtype, ...]] = {
    "int8": (torch.float32, torch.bfloat16),
    "nf4": (torch.float32, torch.bfloat16),
    "fp8": (torch.bfloat16,),
    "int4": (torch.bfloat16,),
}
# the classes of their weights whose products have a gradient
_TRAINED = ("Int8", "NF4")
# weights per scale and zero, the smaller file first: 4.25 or 5 bits per weight
INT4_GROUPS = (128, 32)
# weights per scale, and scales per scale of theirs: 4 + (8 + 16 / 256) / 64 = 4.126 bits
NF4_BLOCK, NF4_SCALES = 64, 256
# one module in which torchao 0.17 and 0.18, between which the class moved, both have it
_NF4_MODULE = "torchao.prototype._nf4tensor_api"
# the first GPUs with a matrix product for them on their tensor cores
CAPABILITIES = {"int4": (8, 0), "fp8": (8, 9)}


def quantize(model: Llama, name: str) -> None:
    """Replace the weight of every `Linear` of a frozen model, in place.

    int8 has one scale per row, w = scale * q with |w - scale * q| <= scale / 2 and
    scale = max |w| / 127.5. int4 has a scale and a zero per group of 128 or 32 along a row. nf4
    takes the nearest of 16 quantiles of a normal distribution, times the largest |w| of 64 in a
    row's order; those scales, less their mean, are in 8 bits, with one scale per 256 of them. It
    is multiplied out for every product (QLoRA: Dettmers et al. 2023, section 3). fp8 is for speed:
    see float8.py.

    Args:
        model: the base, frozen; in float32 or bfloat16, for fp8 and int4 in bfloat16 on a GPU.
        name: "int8", "nf4", "fp8" or "int4".

    Raises:
        ValueError: there is no such format, torchao or GPU, or the model is quantised already, not
            frozen, or of a dtype or widths that the format does not take.
    """
    weight = model.output_weight
    check_format(name, weight.device)
    if is_quantized(model):
        raise ValueError(
            f'model must hold the weights as read for quantize "{name}", got quantised'
        )
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            raise ValueError(
                f'model must be frozen for quantize "{name}", {parameter_name} requires a gradient'
            )
    if weight.dtype not in FORMATS[name]:
        raise ValueError(
            f'quantize "{name}" needs a base in {_dtypes(name)}, got '
            f"{_short(weight.dtype)}: load it with dtype bfloat16"
        )
    if name == "fp8":
        round_to_float8(model)
        return
    torchao = _import_torchao(name)
    if name == "nf4":
        _quantize_nf4(torchao, model)
        return
    config = _config(torchao, name, model)
    torchao.quantize_(model, config, lambda module, _: isinstance(module, Linear))


def check_format(name: str, device: torch.device | str) -> None:
    """Refuse what needs no model to be refused.

    Raises:
        ValueError: there is no such format, torchao is missing, or int4 has no GPU of sm_80, or
            fp8 none of sm_89.
    """
    if name not in FORMATS:
        choices = " or ".join(f'"{known}"' for known in FORMATS)
        raise ValueError(f"quantize must be {choices}, got {name!r}")
    if name in CAPABILITIES:
        device = torch.device(device)
        got, fits = f"device {device}", False
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            got, fits = f"{got} of sm_{major}{minor}", (major, minor) >= CAPABILITIES[name]
        if not fits:
            first = "".join(map(str, CAPABILITIES[name]))
            raise ValueError(
                f'quantize "{name}" needs an NVIDIA GPU of sm_{first} or newer, got {got}; '
                '"int8" runs anywhere'
            )
    if name != "fp8":
        _import_torchao(name)


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether a weight of the model is torchao's, in float8, or in bytes, as by bitsandbytes."""
    # by the name of its class: without torchao there is nothing to import
    return any(
        type(parameter).__module__.partition(".")[0] == "torchao"
        or isinstance(parameter, Float8Weight)
        or not parameter.is_floating_point()
        for parameter in model.parameters()
    )


def passes_gradients(model: torch.nn.Module) -> bool:
    """Whether an adapter can be trained on a model: its weights are plain, int8, nf4 or fp8.

    Their products' gradients are those of the rounded weights; int4's have none.
    """
    return all(
        type(parameter).__name__.startswith(_TRAINED)
        for parameter in model.parameters()
        if type(parameter).__module__.partition(".")[0] == "torchao"
    )


def _import_torchao(name: str) -> ModuleType:
    try:
        with quiet():
            module = _NF4_MODULE if name == "nf4" else "torchao.quantization"
            return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f'quantize "{name}" needs torchao ({error}): '
            "pip install 'llama-adapter-kernels[quant]'"
        ) from None


def round_to_float8(model: Llama) -> None:
    """What `quantize` does for fp8, on any device: where it is slow, it has the same numbers.

    Raises:
        ValueError: a weight has a width that is no multiple of 16.
    """
    linears = _linears(model)
    for key, module in linears.items():
        shape = tuple(module.weight.shape)
        if any(width % MULTIPLE for width in shape):
            raise ValueError(
                f'quantize "fp8" needs widths that are multiples of {MULTIPLE}, got {key}.weight '
                f"of shape {shape}"
            )
    for module in linears.values():
        module.weight = nn.Parameter(Float8Weight.of(module.weight), requires_grad=False)


def _linears(model: Llama) -> dict[str, Linear]:
    return {key: found for key, found in model.named_modules() if isinstance(found, Linear)}


def _quantize_nf4(torchao: ModuleType, model: Llama) -> None:
    """One weight after the other, so that no two are held twice."""
    linears = _linears(model)
    for key, module in linears.items():
        shape = tuple(module.weight.shape)
        if math.prod(shape) % NF4_BLOCK:
            raise ValueError(
                f'quantize "nf4" needs weights of a multiple of {NF4_BLOCK} numbers, got '
                f"{key}.weight of shape {shape}"
            )
    for module in linears.values():
        weight = module.weight.detach().contiguous()
        # all scales must make whole groups, which are smaller where a weight is
        group = math.gcd(weight.numel() // NF4_BLOCK, NF4_SCALES)
        packed = torchao.NF4Tensor.from_tensor(weight, NF4_BLOCK, group)
        module.weight = nn.Parameter(packed, requires_grad=False)


def _config(torchao: ModuleType, name: str, model: Llama) -> Any:
    """torchao's configuration; its compiler settings, the process's, are left alone."""
    if name == "int8":
        # torchao 0.17 has a deprecated version 1 as its default
        return torchao.Int8WeightOnlyConfig(version=2, set_inductor_config=False)
    widths = {module.in_features for module in _linears(model).values()}
    fitting = [group for group in INT4_GROUPS if all(width % group == 0 for width in widths)]
    if not fitting:
        raise ValueError(
            f'quantize "{name}" needs input widths that are multiples of {INT4_GROUPS[-1]}, got '
            f"{', '.join(map(str, sorted(widths)))}"
        )
    # the packing of torch's own matrix product: the default one needs a package more
    return torchao.Int4WeightOnlyConfig(
        group_size=fitting[0],
        int4_packing_format="tile_packed_to_4d",
        set_inductor_config=False,
    )


def _dtypes(name: str) -> str:
    return " or ".join(map(_short, FORMATS[name]))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
