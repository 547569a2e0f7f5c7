"""Does every method train what it says, leave the host alone, and come off without a trace?"""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llama_adapter.hosts import adapt, adapter_of, unadapt
from llama_adapter.hosts.methods import METHODS, MethodOptions, attach
from tests.llama_adapter.encoder_models import bert, clip, roberta, vit, words
from tests.llama_adapter.hf_models import host
from tests.llama_adapter.method_hosts import CASES, SMALL, attached, disturb, real

WHERE = [
    (name, kind)
    for name, method in METHODS.items()
    for kind in method.hosts
    if (name, kind) != ("linear", "clip")
]
TRAINED = [(name, kind) for name, kind in WHERE if name != "frozen"]
RATES = {"full": 3e-3, "lora": 1e-2, "flamingo": 1e-2}
# these promise to begin at the host, side-tuning with its blend there
AT_HOST = ("zero_init", "frozen", "full", "linear", "bias", "adapter", "side", "lora", "flamingo")


def tensors(model: Any) -> dict[str, Tensor]:
    """Copies of all of a model's numbers, with those that no file would have."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: x.detach().clone() for name, x in named}


def hooks(model: Any) -> list[int]:
    return [
        len(x._forward_hooks) + len(x._forward_pre_hooks) + ("forward" in x.__dict__)
        for x in model.modules()
    ]


def test_the_names_are_those_of_the_tables() -> None:
    assert set(METHODS) == {
        "zero_init", "full", "linear", "bias", "adapter", "vpt_shallow", "vpt_deep",
        "prompt_tuning", "p_tuning_v2", "side", "coop", "lora", "flamingo", "frozen",
    }  # fmt: skip
    known = set(MethodOptions.__dataclass_fields__)
    assert all(set(method.options) <= known for method in METHODS.values())
    assert known == {name for method in METHODS.values() for name in method.options}


@pytest.mark.parametrize(("name", "kind"), TRAINED)
def test_training_moves_what_is_trained_and_nothing_else(name: str, kind: str) -> None:
    case, model = CASES[kind], CASES[kind].make()
    before, flags = tensors(model), [x.requires_grad for x in model.parameters()]
    changed, worked = set(model.__dict__), hooks(model)
    with torch.no_grad():
        theirs = case.run(model)
    made = attached(model, name)
    own = made.parameters()
    trainable = {id(x) for x in model.parameters() if x.requires_grad}
    assert trainable == {id(x) for x in own.values()}
    assert {x.dtype for x in own.values()} == {torch.float32}
    start = tensors(model)
    torch.manual_seed(3)
    optimiser = torch.optim.AdamW(own.values(), lr=RATES.get(name, 3e-2))
    model.train()
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = case.loss(model)
        loss.backward()
        losses.append(loss.item())
        for key, parameter in own.items():
            assert parameter.grad is not None, key
            # what is added to all keys, or to all positions, changes no softmax
            if name not in ("full", "bias") and key != "qa_outputs.bias":
                assert parameter.grad.abs().max() > 0, key
        optimiser.step()
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses
    model.eval()
    names = {id(x): key for key, x in model.named_parameters()}
    moved = {key for key, x in tensors(model).items() if not torch.equal(x, start[key])}
    assert {names[id(x)] for x in own.values()} <= moved
    kept = {id(x) for x in own.values()}
    for key, x in model.named_parameters(remove_duplicate=False):
        assert id(x) in kept or torch.equal(x, start[key]), key
    made.detach()
    after = tensors(model)
    assert set(after) == set(before)
    assert all(torch.equal(x, after[key]) for key, x in before.items())
    assert [x.requires_grad for x in model.parameters()] == flags
    assert set(model.__dict__) == changed
    assert hooks(model) == worked
    assert not [key for key, x in model.named_parameters() if x.grad is not None]
    with torch.no_grad():
        assert torch.equal(case.run(model), theirs)


@pytest.mark.parametrize(("name", "kind"), [x for x in WHERE if x[0] in AT_HOST])
def test_these_begin_at_the_host(name: str, kind: str) -> None:
    case, model = CASES[kind], CASES[kind].make()
    with torch.no_grad():
        theirs = case.run(model)
        made = attach(model, name, MethodOptions(**SMALL, side_alpha=1.0))
        got = case.run(model)
        assert theirs.std() > 0.1
        torch.testing.assert_close(
            got, theirs, rtol=1e-6, atol=5e-6 if name == "zero_init" else 1e-6
        )
        if made.parameters():
            disturb(made, torch.Generator().manual_seed(1))
            assert (case.run(model) - theirs).abs().max() > 0.01


@pytest.mark.parametrize(("name", "kind"), TRAINED)
def test_a_state_brings_back_the_outputs(name: str, kind: str) -> None:
    case, model = CASES[kind], CASES[kind].make()
    made = attached(model, name)
    with torch.no_grad():
        wanted, state = case.run(model), made.state_dict()
        disturb(made, torch.Generator().manual_seed(2))
        assert not torch.allclose(case.run(model), wanted, atol=1e-3)
        assert set(state) == set(made.parameters())
        made.detach()
        again = attached(model, name, seed=8)
        again.load_state_dict(state)
        assert torch.equal(case.run(model), wanted)
    first = next(iter(state))
    for bad, text in (
        ({first: state[first]} | {"x": state[first]}, r"state .*, for"),
        (state | {first: torch.ones(1, 2, 3, 4, 5)}, "must be"),
        ({key: x for key, x in state.items() if key != first}, f"lacks {first}"),
    ):
        with pytest.raises(ValueError, match=text):
            again.load_state_dict(bad)


@pytest.mark.parametrize(("name", "kind"), [x for x in WHERE if x[1] in ("roberta", "bert")])
def test_a_padded_batch_is_its_rows_alone(name: str, kind: str) -> None:
    case, model = CASES[kind], CASES[kind].make()
    attached(model, name)
    with torch.no_grad():
        together = case.run(model)
        for row, shown in enumerate(case.inputs["attention_mask"].bool()):
            ids = case.inputs["input_ids"][row : row + 1, shown]
            out = model(input_ids=ids)
            alone = torch.stack([out[key] for key in case.output.split()], -1).squeeze(-1)[0]
            torch.testing.assert_close(together[row, shown], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if "clip" in METHODS[name].hosts])
def test_one_seed_gives_one_start(name: str) -> None:
    if name in ("frozen", "linear"):
        return
    starts = []
    for seed in (4, 4, 5):
        torch.manual_seed(len(starts))
        generator = torch.Generator().manual_seed(seed)
        starts.append(attach(clip(), name, generator=generator).state_dict())
    assert all(torch.equal(x, starts[1][key]) for key, x in starts[0].items())
    drawn = not all(torch.equal(x, starts[2][key]) for key, x in starts[0].items())
    assert drawn == (name not in ("full", "bias"))


@pytest.mark.parametrize("name", ["zero_init", "adapter", "p_tuning_v2", "side", "lora", "flamingo",
                                  "full", "bias"])  # fmt: skip
def test_a_clip_has_two_encoders(name: str) -> None:
    case, model = CASES["clip"], clip()
    found = {}
    for encoders in (("visual",), ("text",), ("visual", "text")):
        with torch.no_grad():
            theirs = model(**case.inputs)
            made = attached(model, name, encoders=encoders)
            got = model(**case.inputs)
        for encoder, key in (("visual", "image_embeds"), ("text", "text_embeds")):
            assert torch.equal(got[key], theirs[key]) == (encoder not in encoders)
        found[encoders] = set(made.parameters())
        made.detach()
    one, other, both = found.values()
    assert not one & other
    assert one | other == both


def test_encoders_and_hosts_without_heads() -> None:
    config = clip().config
    pictures = transformers.CLIPVisionModel(config.vision_config)
    texts = transformers.CLIPTextModelWithProjection(config.text_config)
    for model, name in ((pictures, "vpt_deep"), (texts, "coop"), (texts, "p_tuning_v2")):
        made = attached(model, name)
        assert made.groups().keys() == {"method"}
        made.detach()
    bare = transformers.ViTModel(vit().config)
    with torch.no_grad():
        wanted = bare(**CASES["vit"].inputs, output_hidden_states=True)
        made = attach(bare, "side", MethodOptions(side_alpha=1.0))
        got = bare(**CASES["vit"].inputs, output_hidden_states=True)
    for one, other in zip(got.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(one, other)


def test_pooling_sees_no_prompts() -> None:
    """CLIP's classifier takes the mean of the patches, BERT's pooler the first token."""
    model = transformers.CLIPForImageClassification(clip().config).eval()
    seen: list[Tensor] = []
    model.classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made = attached(model, "vpt_deep")
    assert made.groups().keys() == {"method", "head"}
    body = bert("SequenceClassification").bert
    attached(body, "prompt_tuning")
    with torch.no_grad():
        model(**CASES["vit"].inputs)
        features = model.vision_model(**CASES["vit"].inputs).last_hidden_state
        assert features.shape == (3, 26, 48)
        torch.testing.assert_close(seen[0], features[:, 1:].mean(1))
        out = body(**CASES["bert"].inputs)
        torch.testing.assert_close(out.pooler_output, body.pooler(out.last_hidden_state))


def test_groups_tell_the_head_apart() -> None:
    for name in METHODS:
        if "vit" not in METHODS[name].hosts or name == "frozen":
            continue
        made = attached(vit(), name)
        assert set(made.groups()["head"]) == {"classifier.weight", "classifier.bias"}
        assert made.groups().keys() == ({"head"} if name == "linear" else {"method", "head"})
        joined = [key for group in made.groups().values() for key in group]
        assert sorted(joined) == sorted(made.parameters())
    assert attach(vit(), "frozen").groups() == {}


@pytest.mark.parametrize(("name", "kind"), TRAINED)
def test_a_copy_of_the_host_has_its_own(name: str, kind: str) -> None:
    case, model = CASES[kind], CASES[kind].make()
    made = attached(model, name)
    with torch.no_grad():
        twin = copy.deepcopy(model)
        wanted = case.run(twin)
        disturb(made, torch.Generator().manual_seed(2))
        assert torch.equal(case.run(twin), wanted)
        assert not torch.allclose(case.run(model), wanted, atol=1e-3)


@pytest.mark.parametrize("name", [x for x in METHODS if "roberta" in METHODS[x].hosts])
def test_a_half_precision_host_is_trained_in_float32(name: str) -> None:
    case, model = CASES["roberta"], roberta().to(torch.bfloat16)
    if name == "bias":
        with pytest.raises(ValueError, match="bias needs a model in float32"):
            attach(model, name)
        assert all(x.requires_grad for x in model.parameters())
        name = "full"
    with torch.no_grad():
        theirs = case.run(model)
    made = attached(model, name)
    assert {x.dtype for x in made.parameters().values()} <= {torch.float32}
    if name != "frozen":
        case.loss(model).backward()
        assert all(x.grad is not None for x in made.parameters().values())
    made.detach()
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(case.run(model), theirs)


@pytest.mark.parametrize(("name", "kind"), [x for x in TRAINED if x[1] in ("vit", "roberta")])
def test_recomputed_layers_give_the_same_gradients(name: str, kind: str) -> None:
    case, found = CASES[kind], []
    for recompute in (False, True):
        model = case.make()
        made = attached(model, name, prefix_dropout=0.0, lora_dropout=0.0)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        case.loss(model).backward()
        found.append({key: x.grad for key, x in made.parameters().items()})
    for key, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "kind"), [x for x in TRAINED if x[1] in ("roberta", "clip")])
def test_mixed_precision_trains_in_float32(name: str, kind: str) -> None:
    case, model = CASES[kind], CASES[kind].make()
    made = attached(model, name)
    with torch.no_grad():
        whole = case.run(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert (case.run(model) - whole).abs().max() < 0.1 * whole.abs().max()
        case.loss(model).backward()
    for parameter in made.parameters().values():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["ViT-B/16", "RoBERTa-large", "CLIP ViT-B/16"])
def test_real_shapes_train_and_come_back(shape: str) -> None:
    model = real(shape).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02, generator=generator)
    for module in model.modules():
        for name in ("position_ids", "token_type_ids"):
            if (found := module._buffers.get(name)) is not None:
                own = torch.arange(found.shape[-1])[None]
                module._buffers[name] = own if name == "position_ids" else 0 * own
    pictures, ids = torch.randn(2, 3, 224, 224, generator=generator), words(2, 40)
    given = {"pixel_values": pictures} if shape != "RoBERTa-large" else {"input_ids": ids}
    given |= {"input_ids": ids[:, :20]} if shape == "CLIP ViT-B/16" else {}

    def run() -> Tensor:
        out = model(**given)
        return out[next(x for x in out if "logits" in x)]

    model.eval()
    with torch.no_grad():
        theirs = run()
    for name, kind in WHERE:
        if not shape.lower().startswith(kind) or name == "frozen":
            continue
        made = attach(model, name, MethodOptions(side_alpha=1.0), generator=generator)
        got = run()
        if name in AT_HOST:
            torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-5)
        got.square().mean().backward()
        assert all(x.grad is not None for x in made.parameters().values())
        made.detach()
        with torch.no_grad():
            assert torch.equal(run(), theirs)


def test_one_host_has_one_method() -> None:
    model = vit()
    made = attached(model, "adapter")
    with pytest.raises(ValueError, match="model has adapter on it already"):
        attach(model, "lora")
    made.detach()
    with pytest.raises(ValueError, match="adapter is off this model already"):
        made.detach()
    made = attached(model, "zero_init")
    with pytest.raises(ValueError, match="model has zero_init on it already"):
        attach(model, "linear")
    made.detach()
    assert adapter_of(model) is None
    adapt(model)
    with pytest.raises(ValueError, match="model has an adapter on it already"):
        attach(model, "linear")


@pytest.mark.parametrize(
    ("make", "name", "options", "text"),
    [
        (vit, "prefix", {}, "name must be one of zero_init, .*, got 'prefix'"),
        (vit, "prompt_tuning", {}, "prompt_tuning is for roberta, bert, in a text encoder"),
        (roberta, "vpt_deep", {}, "vpt_deep is for vit, clip, in a visual encoder, got a Roberta"),
        (vit, "coop", {}, "coop is for clip, in a text encoder, got a ViTForImageClassification"),
        (clip, "linear", {}, "linear is for a host with a task head, got a CLIPModel"),
        (vit, "adapter", {"encoders": ("text",)}, "encoders must be of visual for adapter"),
        (vit, "p_tuning_v2", {"layers": 9}, "layers must be 1 to 3 for this host, got 9"),
        (vit, "p_tuning_v2", {"shift_positions": True}, "shift_positions must be False for a vit"),
        (vit, "zero_init", {"shift_positions": True}, "shift_positions must be False for a vit"),
        (vit, "adapter", {"reduction": 100}, "reduction must be 1 to the width 48, got 100"),
        (clip, "coop", {"context_ids": (3, 4)}, "context_ids must be as many as prompt_length"),
        (host, "adapter", {}, "model must be a ViT, RoBERTa, BERT or CLIP, got llama"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, name: str, options: Any, text: str) -> None:
    model = make()
    before, changed = tensors(model), set(model.__dict__)
    with pytest.raises(ValueError, match=text):
        attach(model, name, MethodOptions(**options))
    assert all(torch.equal(x, before[key]) for key, x in tensors(model).items())
    assert all(x.requires_grad for x in model.parameters())
    assert set(model.__dict__) == changed
    assert not any(hooks(model))


@pytest.mark.parametrize("name", ["lora", "bias", "p_tuning_v2", "zero_init"])
def test_adapt_and_unadapt_leave_an_attached_method_alone(name: str) -> None:
    model = roberta()
    flags = [x.requires_grad for x in model.parameters()]
    method = attach(model, name)
    trained = [x.requires_grad for x in model.parameters()]
    with pytest.raises(ValueError, match=f"model has {name} on it already: take that off first"):
        adapt(model)
    with pytest.raises(ValueError, match=rf"freed of {name} by its detach\(\), not by unadapt"):
        unadapt(model)
    assert [x.requires_grad for x in model.parameters()] == trained
    method.detach()
    assert [x.requires_grad for x in model.parameters()] == flags
    adapt(model)
    unadapt(model)


def test_options_that_are_none_are_refused() -> None:
    options: Any = {"rank": 4}
    with pytest.raises(ValueError, match=r"options must be MethodOptions, got \{'rank': 4\}"):
        attach(vit(), "lora", options)
