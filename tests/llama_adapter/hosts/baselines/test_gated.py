"""Is the Flamingo-style gate on the residual stream, in front of the layer?"""

import math

import torch
from torch import Tensor

from llama_adapter.hosts.methods import MethodOptions, attach
from tests.llama_adapter.encoder_models import roberta, vit
from tests.llama_adapter.method_hosts import CASES, attached


def literal(x: Tensor, state: dict[str, Tensor], heads: int) -> Tensor:
    """x + tanh(gate) * attention(norm(x), P), written out."""
    norm = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    norm = norm * state["norm.weight"] + state["norm.bias"]
    query, key, value = state["attention.in_proj_weight"].chunk(3)
    q, k, v = norm @ query.T, state["prompts"] @ key.T, state["prompts"] @ value.T
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)
    k, v = (y.unflatten(-1, (heads, -1)).transpose(0, 1) for y in (k, v))
    out = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
    out = out.transpose(1, 2).flatten(2) @ state["attention.out_proj.weight"].T
    return x + state["gate"].tanh() * out


def test_a_gated_layer_is_the_literal_formula() -> None:
    for model, name, kind in (
        (vit(), "vit.layers", "vit"),
        (roberta(), "roberta.encoder.layer", "roberta"),
    ):
        layers = model.get_submodule(name)
        seen: list[Tensor] = []

        def hook(module: object, args: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
            seen.append(args[0])

        layers[2].register_forward_pre_hook(hook)
        made = attached(model, "flamingo", layers=2)
        layers[2].register_forward_pre_hook(hook)
        with torch.no_grad():
            CASES[kind].run(model)
        encoder = "visual" if kind == "vit" else "text"
        start = f"llama_adapter_{encoder}.layers.1."
        state = {key.removeprefix(start): x for key, x in made.state_dict().items() if start in key}
        before, after = seen
        torch.testing.assert_close(after, literal(before, state, 3), rtol=1e-5, atol=1e-5)
        assert (after - before).abs().max() > 0.1


def test_gates_begin_at_zero() -> None:
    state = attach(vit(), "flamingo", MethodOptions(layers=1)).state_dict()
    gates = {name: x for name, x in state.items() if name.endswith("gate")}
    assert list(gates) == ["llama_adapter_visual.layers.0.gate"]
    assert all(x == 0 for x in gates.values())
