"""Do counted parameters agree with attached ones, and with the papers at real shapes?"""

from typing import Any

import pytest

from llama_adapter.hosts.method_counts import count_parameters
from llama_adapter.hosts.methods import METHODS, MethodOptions, attach
from tests.llama_adapter.method_hosts import CASES, CLIP, ROBERTA, SMALL, VIT, real

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "zero_init": [{}, {"prompt_kind": "kv", "layers": 2}],
    "p_tuning_v2": [{"layers": 2}],
    "flamingo": [{"layers": 2}],
    "lora": [{"rank": 2}],
    "side": [{"side_layers": 3, "reduction": 2}],
}


@pytest.mark.parametrize("name", METHODS)
def test_counts_are_what_is_attached(name: str) -> None:
    for kind, case in CASES.items():
        if kind not in METHODS[name].hosts or (name, kind) == ("linear", "clip"):
            continue
        both = [{"encoders": ("visual", "text")}] if kind == "clip" else []
        usual = "encoders" in METHODS[name].options
        for given in [*VARIANTS.get(name, [{}]), *(both if usual else [])]:
            options, model = MethodOptions(**SMALL | given), case.make()
            counts = count_parameters(model, name, options)
            groups = attach(model, name, options).groups()
            found = {key: sum(x.numel() for x in group.values()) for key, group in groups.items()}
            assert counts == {"method": 0, "head": 0} | found


@pytest.mark.parametrize(
    ("shape", "name", "options", "method"),
    [
        (VIT, "zero_init", {}, 12 * 10 * 768 + 12 * 12),
        (VIT, "vpt_shallow", {"prompt_length": 50}, 38_400),
        (VIT, "vpt_deep", {"prompt_length": 50}, 460_800),
        (VIT, "adapter", {}, 12 * (2 * 768 * 96 + 768 + 96)),
        (VIT, "bias", {}, 12 * (4 * 768 + 3072 + 768 + 2 * 768) + 2 * 768),
        (VIT, "full", {}, 85_798_656),
        (VIT, "linear", {}, 0),
        (VIT, "lora", {"rank": 8}, 12 * 2 * 8 * (768 + 768)),
        (ROBERTA, "p_tuning_v2", {"prompt_length": 16}, 786_432),
        (ROBERTA, "p_tuning_v2", {"prompt_length": 224}, 224 * 49_152),
        (ROBERTA, "zero_init", {"prompt_length": 16, "prompt_kind": "kv"}, 786_432 + 384),
        (ROBERTA, "prompt_tuning", {"prompt_length": 16}, 16_384),
        (ROBERTA, "lora", {"rank": 2}, 24 * 2 * 2 * 2 * 1024),
        (ROBERTA, "lora", {"rank": 16}, 24 * 2 * 16 * 2 * 1024),
        (CLIP, "zero_init", {}, 12 * 10 * 768 + 12 * 12),
        (CLIP, "vpt_deep", {"prompt_length": 8}, 12 * 8 * 768),
        (CLIP, "coop", {"prompt_length": 16}, 16 * 512),
        (CLIP, "full", {}, 149_620_737),
        (CLIP, "flamingo", {"prompt_length": 8}, 12 * (4 * 768**2 + 2 * 768 + 8 * 768 + 1)),
        (CLIP, "frozen", {}, 0),
    ],
)
def test_counts_at_real_shapes(shape: str, name: str, options: dict[str, Any], method: int) -> None:
    model, made = real(shape), MethodOptions(**options)
    head = 0 if name == "frozen" else {VIT: 768 * 100 + 100, ROBERTA: 2 * 1024 + 2, CLIP: 0}[shape]
    assert count_parameters(model, name, made) == {"method": method, "head": head}
    # adapt wants numbers
    if name != "zero_init":
        found = attach(model, name, made).parameters()
        assert sum(x.numel() for x in found.values()) == method + head
        assert {x.device.type for x in found.values()} <= {"meta"}
