"""Does a host with an adapter compute the papers' formula, and come back bitwise?"""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from llama_adapter.adapter import Adapter
from llama_adapter.config import AdapterConfig, LlamaConfig
from llama_adapter.hosts import SUBMODULE, adapt, adapter_of, unadapt
from llama_adapter.hosts.attention import NAME
from llama_adapter.model import Llama
from tests.llama_adapter.hf_models import (
    KINDS,
    SIZES,
    generated,
    host,
    on_transformers,
    padding,
    peft_model,
    run,
    tokens,
)


def adapted(kind: str = "llama", **options: Any) -> Any:
    """A host with an adapter, gates random per head, some above 1."""
    model = host(kind)
    generator = torch.Generator().manual_seed(17)
    adapter = adapt(model, prompt_length=5, generator=generator, **options)
    with torch.no_grad():
        adapter.gates.normal_(std=1.5, generator=generator)
    assert adapter.gates.abs().max() > 1
    return model


@pytest.mark.parametrize("activation", ["tanh", "identity"])
@pytest.mark.parametrize("scope", ["head", "layer"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_layer_is_the_literal_formula(kind: str, scope: str, activation: str) -> None:
    model = adapted(kind, layers=2, gate_scope=scope, gate_activation=activation)
    attention, adapter = model.model.layers[3].self_attn, adapter_of(model)
    assert adapter is not None
    assert adapter.layers == (2, 3)
    hidden, angle = torch.randn(2, 4, 64), torch.randn(1, 4, 8)
    given = {"position_embeddings": (angle.cos(), angle.sin()), "attention_mask": None}
    with torch.no_grad():
        got, _ = attention(hidden, **given)
        base, _ = type(attention).forward(attention, hidden, **given)
        q = attention.q_proj(hidden).view(2, 4, 8, 8).transpose(1, 2)
        turned = torch.cat([-q[..., 4:], q[..., :4]], -1)
        q = q * angle.cos()[:, None] + turned * angle.sin()[:, None]
        k, v = (
            x(adapter.prompts[1]).view(5, 2, 8).transpose(0, 1).repeat_interleave(4, 0)
            for x in (attention.k_proj, attention.v_proj)
        )
        gate = adapter.gates[1].expand(8)[:, None, None]
        gate = gate.tanh() if activation == "tanh" else gate
        seen = gate * ((q @ k.mT / math.sqrt(8)).softmax(-1) @ v)
        added = seen.transpose(1, 2).flatten(2) @ attention.o_proj.weight.T
    assert added.abs().max() > 0.1
    torch.testing.assert_close(got, base + added, rtol=0, atol=1e-5)


@pytest.mark.parametrize("given", [None, padding()], ids=["whole", "left padding"])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_gates_change_nothing(kind: str, given: Tensor | None) -> None:
    model, ids = host(kind), tokens()
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=given).logits
        adapt(model)
        got = model(input_ids=ids, attention_mask=given).logits
        forwards = [layer.self_attn.__dict__.pop("forward", None) for layer in model.model.layers]
        ours = model(input_ids=ids, attention_mask=given).logits
    assert sum(forward is not None for forward in forwards) == 2
    assert torch.equal(got, ours)
    seen = 1 if given is None else given[..., None]
    torch.testing.assert_close(got * seen, theirs * seen, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_row(kind: str) -> None:
    model, ids = adapted(kind), tokens()
    mask = padding()
    together = generated(model, ids, mask)
    for row, shown in enumerate(mask.bool()):
        alone = generated(model, ids[row : row + 1, shown])
        assert torch.equal(together[row, 11:], alone[0, int(shown.sum()) :])
    # as generate() counts them: prompts have no position, so the queries' own matter
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        for row, shown in enumerate(mask.bool()):
            alone = model(input_ids=ids[row : row + 1, shown]).logits[0]
            torch.testing.assert_close(logits[row, shown], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}],
                         ids=str)  # fmt: skip
def test_caches_give_the_same_tokens(options: dict[str, Any]) -> None:
    model, ids = adapted(), tokens()
    if options.get("cache_implementation"):
        options = options | {"disable_compile": True}
    step, expected = ids, []
    with torch.no_grad():
        for _ in range(8):
            expected.append(model(input_ids=step, use_cache=False).logits[:, -1].argmax(-1))
            step = torch.cat([step, expected[-1][:, None]], 1)
    assert torch.equal(generated(model, ids, **options), step)


def test_the_lean_model_and_the_host_agree(
    tiny_model: Llama, tiny_config: LlamaConfig, tiny_adapter: Adapter
) -> None:
    theirs = on_transformers(tiny_model)
    adapt(theirs, adapter=tiny_adapter)
    ids = tokens(2, 23)
    expected = tiny_model(ids, tiny_model.project(tiny_adapter))
    got = theirs(input_ids=ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    leaves = list(tiny_adapter.parameters())
    wanted, found = (torch.autograd.grad(x.square().mean(), leaves) for x in (expected, got))
    for theirs_grad, ours in zip(found, wanted, strict=True):
        assert ours.abs().max() > 1e-4
        torch.testing.assert_close(theirs_grad, ours, rtol=1e-4, atol=1e-5)


def test_only_the_adapter_is_trained_and_in_float32() -> None:
    model = adapted()
    trainable = {name: x for name, x in model.named_parameters() if x.requires_grad}
    assert sorted(trainable) == [f"{SUBMODULE}.gates", f"{SUBMODULE}.prompts"]
    assert [tuple(x.shape) for x in trainable.values()] == [(2, 5, 64), (2, 8)]
    half = host().to(torch.bfloat16)
    adapter = adapt(half, prompt_length=5)
    assert {x.dtype for x in adapter.parameters()} == {torch.float32}
    torch.nn.init.constant_(adapter.gates, 1.3)
    _, grads = run(half, tokens(), padding())
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_gradients_come_after_generating() -> None:
    model = adapted()
    _, expected = run(model, tokens())
    generated(model, tokens())
    with torch.no_grad():
        model(input_ids=tokens())
    _, got = run(model, tokens())
    for name, grad in expected.items():
        assert grad.abs().max() > 1e-4
        assert torch.equal(got[name], grad)


def everything(model: nn.Module) -> list[tuple[object, ...]]:
    """Attributes, parameters, buffers and modules of every module."""
    return [
        (*(dict(x) for x in (m.__dict__, m._parameters, m._buffers, m._modules)),)
        for m in model.modules()
    ]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_unadapt_gives_back_the_host(implementation: str) -> None:
    model = host(attn_implementation=implementation)
    model.model.embed_tokens.requires_grad_(False)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    before = everything(model)
    trainable = [name for name, x in model.named_parameters() if x.requires_grad]
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
    adapter = adapt(model)
    assert model.config._attn_implementation == NAME
    nn.init.constant_(adapter.gates, 1.5)
    with torch.no_grad():
        assert not torch.equal(model(input_ids=tokens()).logits, expected)
    generated(model, tokens())
    assert unadapt(model) is adapter
    after = everything(model)
    # generate() leaves a generation cache of its own behind
    assert [set(x[0]) for x in after] == [set(x[0]) for x in before]
    assert [x[1:] for x in after] == [x[1:] for x in before]
    assert [name for name, x in model.named_parameters() if x.requires_grad] == trainable
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, expected)
    with pytest.raises(ValueError, match="model must have an adapter"):
        unadapt(model)
    # and may have it again
    adapt(model, adapter=adapter)


def test_a_forward_of_the_instance_is_kept() -> None:
    model, calls = host(), []
    attention = model.model.layers[3].self_attn
    theirs = attention.forward

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return theirs(*args, **kwargs)

    attention.forward = hooked
    adapt(model)
    with torch.no_grad():
        model(input_ids=tokens())
    assert len(calls) == 1
    unadapt(model)
    assert attention.forward is hooked


def test_what_does_not_fit_is_refused_and_nothing_changes() -> None:
    model = host()
    before = everything(model)
    other = Adapter(AdapterConfig(), LlamaConfig(dim=32, n_layers=4, n_heads=8, vocab_size=9))
    deep = Adapter(
        AdapterConfig(), LlamaConfig(dim=64, n_layers=5, n_heads=8, vocab_size=9), layers=(4,)
    )
    cases: list[tuple[dict[str, Any], str]] = [
        ({"adapter": other}, "adapter must be for width 64, 8 heads and 4 layers, got width 32"),
        ({"adapter": deep}, r"got width 64, 8 heads and layers \(4,\)"),
        ({"layers": 5}, "layers must be from 1 to 4, got 5"),
        ({"layers": (1, 4)}, "layers must be ascending indices below 4"),
        ({"prompt_length": 0}, "prompt_length must be from 1"),
        ({"gate_activation": "relu"}, "gate_activation must be one of"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            adapt(model, **options)
        assert everything(model) == before
    adapt(model)
    with pytest.raises(ValueError, match="model has an adapter already"):
        adapt(model)
    with pytest.raises(ValueError, match="8 to 256 channels in steps of 8, got 12"):
        adapt(host(head_dim=12))


def test_layers_may_be_a_list() -> None:
    assert adapt(host(), layers=[1, 2]).layers == (1, 2)


def test_a_host_that_carries_pefts_prompts_is_refused_untouched() -> None:
    model = peft_model(host()).base_model.model
    trainable = [x.requires_grad for x in model.parameters()]
    with pytest.raises(ValueError, match="k_proj of its own layers, got a AdaptedAttention"):
        adapt(model, layers=4)
    assert model.config._attn_implementation != NAME
    assert [x.requires_grad for x in model.parameters()] == trainable


def test_a_head_that_the_file_does_not_hold_is_refused() -> None:
    config = transformers.LlamaConfig(**SIZES)
    with pytest.raises(ValueError, match="causal language modelling, got LlamaForSequenceClass"):
        adapt(transformers.LlamaForSequenceClassification(config))


def test_methods_of_an_instance_come_back() -> None:
    model = host()
    model.generate = own = lambda **_: "own"
    adapt(model, layers=2)
    assert model.generate is not own
    unadapt(model)
    assert model.generate is own
    assert "save_pretrained" not in model.__dict__


def test_a_projection_that_is_replaced_is_the_one_used() -> None:
    model, replaced = adapted(), host()
    for one in (model, replaced):
        torch.manual_seed(2)
        one.model.layers[3].self_attn.v_proj = nn.Linear(64, 16, bias=False)
    adapter = unadapt(adapted())
    adapt(replaced, adapter=adapter)
    with torch.no_grad():
        got, expected = (one(input_ids=tokens()).logits for one in (model, replaced))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_change_during_generation_is_seen() -> None:
    """By a processor of logits that trains, as nothing but a test would."""
    model, ids = adapted(), tokens(1)
    adapter = adapter_of(model)
    assert adapter is not None
    seen: list[Tensor] = []

    def change(_: Tensor, scores: Tensor) -> Tensor:
        if not seen:
            adapter.prompts.data = adapter.prompts.data.clone()
            with torch.no_grad():
                adapter.prompts.mul_(-0.5)
            seen.append(model(input_ids=ids).logits)
        return scores

    generated(model, ids, logits_processor=transformers.LogitsProcessorList([change]))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-5)


def test_a_pickled_host_runs_in_another_process(tmp_path: Path) -> None:
    model = adapted()
    del model.generate
    torch.save(model, tmp_path / "model.pt")
    code = "import sys, torch; m = torch.load(sys.argv[1], weights_only=False)\n"
    code += "print(m(input_ids=torch.tensor([[5, 7]])).logits.sum().item())"
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = float(model(input_ids=torch.tensor([[5, 7]])).logits.sum())
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, abs=1e-2)


def test_models_that_share_a_configuration_are_adapted_one_by_one() -> None:
    config = transformers.LlamaConfig(**SIZES)
    first, second = (transformers.LlamaForCausalLM(config) for _ in range(2))
    adapt(first)
    assert second.config is config
    assert (first.config._attn_implementation, config._attn_implementation) == (NAME, "sdpa")
    adapt(second)
    unadapt(first)
    assert first.config is first.model.layers[0].self_attn.config is config
    with torch.no_grad():
        second(input_ids=tokens())
    unadapt(second)
    assert config._attn_implementation == "sdpa"


def test_a_host_whose_weights_are_elsewhere_is_refused_untouched() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = host()
    accelerate.cpu_offload(model, execution_device="cpu")
    forwards = {name: m.__dict__.get("forward") for name, m in model.named_modules()}
    with pytest.raises(ValueError, match="weights on a device, got some that are offloaded"):
        adapt(model)
    assert model.config._attn_implementation != NAME
    assert forwards == {name: m.__dict__.get("forward") for name, m in model.named_modules()}


def test_a_host_that_accelerate_has_placed_is_adapted() -> None:
    """As `device_map` places it: hooks on every layer, which move what comes in."""
    accelerate = pytest.importorskip("accelerate")
    model, placed = adapted(), host()
    devices = dict.fromkeys(("model", "lm_head"), "cpu")
    accelerate.dispatch_model(placed, devices, main_device="cpu", force_hooks=True)
    adapt(placed, adapter=unadapt(adapted()))
    with torch.no_grad():
        got, expected = (one(input_ids=tokens()).logits for one in (placed, model))
    assert torch.equal(got, expected)


def test_a_copy_on_another_device_says_what_runs_instead() -> None:
    """DataParallel hands a copy of the layer its input on another device."""
    attention = adapted().model.layers[3].self_attn
    hidden = torch.empty(2, 4, 64, device="meta")
    with pytest.raises(RuntimeError, match=r"must be on meta as its input is, got cpu.*torchrun"):
        attention(hidden, position_embeddings=(hidden, hidden), attention_mask=None)


@pytest.mark.parametrize("left", [True, False])
def test_one_graph_with_a_mask(left: bool) -> None:
    """Bounds of the padding are for the data to say, and a graph does not ask."""
    model, ids, mask = adapted(), tokens(), padding(left=left)

    def call(ids: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    with torch.no_grad():
        expected = call(ids, mask) * mask[..., None]
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        got = compiled(ids, mask) * mask[..., None]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
