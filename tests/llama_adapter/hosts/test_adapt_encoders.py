"""Do ViT, BERT, RoBERTa and CLIP with an adapter compute the papers' formula, and come back?"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from llama_adapter.checkpoints.adapter_file import load_adapter, read_header
from llama_adapter.checkpoints.adapter_formats import (
    ReadOptions,
    read_any_adapter,
    write_adapter_as,
)
from llama_adapter.convert import describe_adapter
from llama_adapter.hosts import adapt, adapter_of, adapters_of, unadapt
from llama_adapter.hosts import attention as interface
from llama_adapter.hosts.attention import NAME
from llama_adapter.hosts.facts import tower_of
from llama_adapter.model import Llama
from tests.llama_adapter.encoder_models import bert, clip, padded, pixels, roberta, vit, words
from tests.llama_adapter.hosts.test_adapt import everything


def output_of(model: Any, mask: Tensor | None = None) -> Tensor:
    """What a model gives for the same pictures or words every time."""
    if model.config.model_type == "vit":
        return model(pixel_values=pixels()).logits
    if model.config.model_type == "clip":
        out = model(input_ids=words(), attention_mask=mask, pixel_values=pixels())
        return torch.cat([out.image_embeds, out.text_embeds])
    return model(input_ids=words(), attention_mask=mask).logits


# a host, and which encoder of it is adapted
HOSTS: dict[str, tuple[Callable[..., Any], str | None]] = {
    "vit": (vit, None),
    "roberta": (roberta, None),
    "bert": (bert, None),
    "clip": (clip, None),
    "clip text": (clip, "text"),
}
every_host = pytest.mark.parametrize("name", HOSTS)


def host(name: str, **options: Any) -> tuple[Any, str | None]:
    make, encoder = HOSTS[name]
    return make(**options), encoder


def with_gates(model: Any, encoder: str | None, **options: Any) -> Any:
    """An adapter of five rows, with gates random per head, some above 1."""
    generator = torch.Generator().manual_seed(17)
    adapter = adapt(model, encoder=encoder, prompt_length=5, generator=generator, **options)
    with torch.no_grad():
        adapter.gates.normal_(std=1.5, generator=generator)
        adapter.gates[0, 0] = 1.7
    assert adapter.gates.abs().max() > 1
    return adapter


@every_host
@pytest.mark.parametrize("kind", ["hidden", "kv"])
@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_an_adapted_layer_is_the_literal_formula(name: str, kind: str, activation: str) -> None:
    model, encoder = host(name)
    adapter = with_gates(model, encoder, prompt_kind=kind, gate_activation=activation, layers=2)
    tower = tower_of(model, encoder)
    heads, width = tower.shape().n_heads, tower.shape().dim
    assert adapter.layers == (1, 2)
    attention = tower.attentions()[2]
    hidden = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(8))
    query, key, value = (
        attention.get_submodule(one)
        for one in (
            [*("query", "key", "value")] if "bert" in name else ["q_proj", "k_proj", "v_proj"]
        )
    )
    with torch.no_grad():
        got = attention(hidden, attention_mask=None)[0]
        base = type(attention).forward(attention, hidden, attention_mask=None)[0]
        rows = adapter.prompts[1]
        pair = (key(rows), value(rows)) if kind == "hidden" else rows
        k, v = (x.view(5, heads, -1).transpose(0, 1) for x in pair)
        q = query(hidden).view(2, 7, heads, -1).transpose(1, 2)
        gate = adapter.gates[1].view(-1, 1, 1)
        gate = gate.tanh() if activation == "tanh" else gate
        added = gate * ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v)
        added = added.transpose(1, 2).flatten(2)
        out = next((m for n, m in attention.named_children() if n in ("o_proj", "out_proj")), None)
        if out is not None:
            added = added @ out.weight.T
    assert added.abs().max() > 0.1
    torch.testing.assert_close(got, base + added, rtol=0, atol=1e-5)


@every_host
@pytest.mark.parametrize(
    "given", [None, padded(), padded(left=True)], ids=["whole", "right", "left"]
)
def test_zero_gates_are_the_host_bitwise(name: str, given: Tensor | None) -> None:
    model, encoder = host(name)
    mask = given if tower_of(model, encoder).host.kind != "vit" else None
    seen = torch.ones(1) if mask is None or "clip" in name else mask[..., None]
    with torch.no_grad():
        theirs = output_of(model, mask)
        adapter = adapt(model, encoder=encoder)
        got = output_of(model, mask)
        for one in tower_of(model, encoder).attentions():
            assert one.__dict__.pop("forward", None) is not None
        ours = output_of(model, mask)
    assert adapter.layers == (0, 1, 2)
    assert torch.equal(got, ours)
    assert theirs.std() > 0.1
    torch.testing.assert_close(got * seen, theirs * seen, rtol=0, atol=1e-5)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["roberta", "bert"])
def test_padding_reaches_our_operator_and_changes_no_row(
    name: str, left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoder = host(name)
    with_gates(model, encoder)
    calls: list[dict[str, Any]] = []
    ours = interface.zero_init_attention

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return ours(*args, **kwargs)

    monkeypatch.setattr(interface, "zero_init_attention", counted)
    mask = padded(left=left)
    positions = torch.arange(13).expand(3, 13) - (mask == 0).sum(-1, keepdim=True) * left
    positions = positions.clamp(min=0) + (2 if name == "roberta" else 0)
    with torch.no_grad():
        logits = model(input_ids=words(), attention_mask=mask, position_ids=positions).logits
        assert len(calls) == 3
        assert all(not one["causal"] and one["key_lengths"] is not None for one in calls)
        for row, shown in enumerate(mask.bool()):
            ids = words()[row : row + 1, shown]
            alone = model(input_ids=ids).logits[0]
            torch.testing.assert_close(logits[row, shown], alone, rtol=0, atol=1e-5)


def test_a_mask_with_holes_goes_beside_the_hosts_own_attention() -> None:
    model = roberta()
    adapter = with_gates(model, None)
    mask = torch.ones(3, 13, dtype=torch.int64)
    mask[1, 4:7] = 0
    with torch.no_grad():
        got = model(input_ids=words(), attention_mask=mask).logits
        model.set_attn_implementation("sdpa")
        with pytest.raises(RuntimeError, match="must keep attn_implementation"):
            model(input_ids=words(), attention_mask=mask)
        model.set_attn_implementation(NAME)
        kept = mask[1].bool()
        ids, positions = words()[1:2, kept], torch.arange(13)[kept][None] + 2
        alone = model(input_ids=ids, position_ids=positions).logits
    assert adapter.gates.any()
    torch.testing.assert_close(got[1:2, kept], alone, rtol=0, atol=1e-5)


@every_host
def test_dropout_of_the_host_is_its_own(name: str) -> None:
    """In training the tokens' probabilities are dropped by the host's attention, ours add to it."""
    model, encoder = host(name, dropout=0.3)
    with_gates(model, encoder)
    model.train()
    torch.manual_seed(5)
    first = output_of(model)
    assert not torch.equal(first, output_of(model))
    torch.manual_seed(5)
    assert torch.equal(first, output_of(model))
    first[..., 0].sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())


def literal(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, gate: Tensor, **how: Any
) -> Tensor:
    """Equations 5 to 8 on (B, T, H, D), differentiated by torch."""
    scores = torch.einsum("bthd,bshd->bhts", q, k) * how["scale"]
    if how["causal"]:
        hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    out = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
    added = torch.einsum("bthd,phd->bhtp", q, pk) * how["scale"]
    return out + gate[:, None] * torch.einsum("bhtp,phd->bthd", added.softmax(-1), pv)


@every_host
@pytest.mark.parametrize("kind", ["hidden", "kv"])
def test_gradients_are_the_literal_formulas(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoder = host(name)
    adapter = with_gates(model, encoder, prompt_kind=kind)
    leaves = list(adapter.parameters())
    weights = torch.randn(output_of(model).shape, generator=torch.Generator().manual_seed(9))
    found = []
    for function in (interface.zero_init_attention, plain_or_literal):
        monkeypatch.setattr(interface, "zero_init_attention", function)
        found.append(torch.autograd.grad((output_of(model) * weights).sum(), leaves))
    for got, expected in zip(*found, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def plain_or_literal(q: Tensor, k: Tensor, v: Tensor, *segment: Tensor, **how: Any) -> Tensor:
    """`literal`, of no prompt with one of gate zero."""
    if not segment:
        segment = (k[0, :1], v[0, :1], torch.zeros(q.shape[2]))
    return literal(q, k, v, *segment, **how)


@every_host
def test_prompts_get_no_gradient_while_gates_are_zero(name: str) -> None:
    model, encoder = host(name)
    adapter = adapt(model, encoder=encoder)
    output_of(model)[..., 0].sum().backward()
    assert adapter.prompts.grad is not None
    assert not adapter.prompts.grad.any()
    assert adapter.gates.grad is not None
    assert adapter.gates.grad.abs().max() > 1e-4


@every_host
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_unadapt_gives_back_the_host(name: str, implementation: str) -> None:
    model, encoder = host(name)
    model.set_attn_implementation(implementation)
    next(model.parameters()).requires_grad_(False)
    state = {n: x.clone() for n, x in model.state_dict().items()}
    before = everything(model)
    trainable = [n for n, x in model.named_parameters() if x.requires_grad]
    with torch.no_grad():
        expected = output_of(model)
    adapter = with_gates(model, encoder)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    output_of(model).square().sum().backward()
    optimiser.step()
    assert unadapt(model, encoder) is adapter
    after = everything(model)
    assert [x[1:] for x in after] == [x[1:] for x in before]
    assert [set(x[0]) for x in after] == [set(x[0]) for x in before]
    assert [n for n, x in model.named_parameters() if x.requires_grad] == trainable
    assert all(torch.equal(x, state[n]) for n, x in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(output_of(model), expected)
    with pytest.raises(ValueError, match="model must have an adapter"):
        unadapt(model, encoder)
    adapt(model, encoder=encoder, adapter=adapter)


@every_host
def test_an_adapters_file_holds_it_alone_and_fits_its_host(name: str, tmp_path: Path) -> None:
    model, encoder = host(name)
    adapter = with_gates(model, encoder, prompt_kind="kv", gate_scope="layer")
    if adapter.head is not None:
        nn.init.normal_(adapter.head.get_parameter("weight"))
    with torch.no_grad():
        expected = output_of(model)
    model.save_pretrained(tmp_path / "saved")
    files = [path.name for path in (tmp_path / "saved").iterdir()]
    assert files == ["text_adapter.safetensors" if name == "clip text" else "adapter.safetensors"]
    header = read_header(tmp_path / "saved" / files[0])
    kinds = {"clip": "clip_vision", "clip text": "clip_text"}
    assert header.host.kind == kinds.get(name, name)
    assert header.groups == ("prompts", "gates", *(["head"] if "clip" not in name else []))
    assert f"host        {header.host.kind}" in describe_adapter(tmp_path / "saved" / files[0])
    again, _ = host(name)
    read = adapt(again, encoder=encoder, adapter=tmp_path / "saved")
    assert (read.config, read.layers, read.host) == (adapter.config, adapter.layers, adapter.host)
    with torch.no_grad():
        assert torch.equal(output_of(again), expected)
    other, _ = host(name)
    with torch.no_grad():
        tower_of(other, encoder).attentions()[1].get_parameter(
            "key.weight" if "bert" in name else "k_proj.weight"
        ).mul_(1.5)
    with pytest.raises(ValueError, match=r"one shape, but .* sampled weights differ"):
        adapt(other, encoder=encoder, adapter=tmp_path / "saved")


def test_hosts_refuse_each_others_adapters(tmp_path: Path, tiny_model: Llama) -> None:
    for name in HOSTS:
        model, encoder = host(name)
        with_gates(model, encoder)
        model.save_pretrained(tmp_path / name)
        file = next((tmp_path / name).iterdir())
        for other in HOSTS:
            if other != name:
                fresh, its = host(other)
                with pytest.raises(
                    ValueError, match=r"was trained on a .*, but the loaded base is"
                ):
                    adapt(fresh, encoder=its, adapter=file)
        with pytest.raises(ValueError, match="but the loaded base is a llama"):
            load_adapter(file, tiny_model, "tiny")
        stored = read_any_adapter(file, ReadOptions())
        with pytest.raises(ValueError, match="official holds prompts of a llama"):
            write_adapter_as(tmp_path / "official.pth", stored, "official")


def unadapt_new(model: Any) -> Any:
    with_gates(model, None)
    return unadapt(model)


def test_both_encoders_of_a_clip_may_have_an_adapter(tmp_path: Path) -> None:
    model = clip()
    with torch.no_grad():
        expected = output_of(model)
    visual = with_gates(model, None)
    text = with_gates(model, "text")
    assert adapters_of(model) == {"": visual, "text": text}
    assert (visual.prompts.shape, text.prompts.shape) == ((3, 5, 48), (3, 5, 32))
    assert adapter_of(model, "text") is text
    assert adapter_of(model, "visual") is adapter_of(model) is visual
    with pytest.raises(ValueError, match="model has an adapter already"):
        adapt(model, encoder="visual")
    with torch.no_grad():
        both = output_of(model)
    model.save_pretrained(tmp_path)
    again = clip()
    adapt(again, adapter=tmp_path)
    adapt(again, encoder="text", adapter=tmp_path)
    with torch.no_grad():
        assert torch.equal(output_of(again), both)
    unadapt(model)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in text.parameters()
    }
    with torch.no_grad():
        one = output_of(model)
    torch.testing.assert_close(one[:3], expected[:3], rtol=0, atol=1e-5)
    assert torch.equal(one[3:], both[3:])
    unadapt(model, "text")
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(output_of(model), expected)


def test_an_encoder_alone_is_a_host_with_the_same_adapter() -> None:
    model = clip()
    adapter = with_gates(model, None)
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=pixels())
        expected = getattr(expected, "pooler_output", expected)
    alone = transformers.CLIPVisionModelWithProjection(model.config.vision_config).eval()
    unadapt(model)
    alone.vision_model.load_state_dict(model.vision_model.state_dict())
    alone.visual_projection.load_state_dict(model.visual_projection.state_dict())
    assert tower_of(alone).fingerprint().difference(tower_of(model).fingerprint()) is None
    adapt(alone, adapter=adapter)
    with torch.no_grad():
        got = alone(pixel_values=pixels()).image_embeds
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    body = transformers.RobertaModel(roberta().config)
    assert tower_of(body).prefix == ""
    assert tower_of(roberta()).prefix == "roberta."


def test_what_does_not_fit_is_refused_and_nothing_changes() -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (vit(), {"shift_positions": True}, "shift_positions must be False for a vit"),
        (vit(), {"encoder": "text"}, "encoder must be left out for this model, got 'text' for a V"),
        (
            clip(),
            {"encoder": "audio"},
            "encoder must be one of visual, text, got 'audio' for a CLIP",
        ),
        (vit(), {"prompt_kind": "rows"}, r"prompt_kind must be one of \('hidden', 'kv'\), got 'r"),
        (roberta(), {"layers": 4}, "layers must be from 1 to 3, got 4"),
        (roberta(), {"adapter": unadapt_new(bert())}, "must be for a roberta, got one for a bert"),
    ]
    for model, options, message in cases:
        before = everything(model)
        with pytest.raises(ValueError, match=message):
            adapt(model, **options)
        assert everything(model) == before


def test_a_kv_adapter_of_a_llama_does_not_go_into_the_lean_model(
    tiny_model: Llama, tmp_path: Path
) -> None:
    from tests.llama_adapter.hf_models import on_transformers

    theirs = on_transformers(tiny_model)
    with_gates(theirs, None, prompt_kind="kv")
    theirs.save_pretrained(tmp_path)
    adapt(on_transformers(tiny_model), adapter=tmp_path)
    with pytest.raises(ValueError, match="prompts of kind 'kv', which run on models of transform"):
        load_adapter(tmp_path / "adapter.safetensors", tiny_model, "tiny")


@pytest.mark.parametrize("name", ["vit", "roberta"])
def test_what_users_do_with_a_host_gives_the_same(name: str) -> None:
    model, _ = host(name)
    adapter = with_gates(model, None)
    expected = output_of(model)
    with torch.no_grad():
        copied = copy.deepcopy(model)
        assert torch.equal(output_of(copied), expected)
        copied_adapter = adapter_of(copied)
        assert copied_adapter is not None
        copied_adapter.gates.zero_()
        assert torch.equal(output_of(model), expected)
        assert not torch.equal(output_of(copied), expected)
    inputs = {"pixel_values": pixels()} if name == "vit" else {"input_ids": words()}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=0, atol=1e-6)
    grads = torch.autograd.grad(expected.square().sum(), list(adapter.parameters()))
    model.train()
    model.gradient_checkpointing_enable()
    output_of(model).square().sum().backward()
    for parameter, grad in zip(adapter.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-6)
