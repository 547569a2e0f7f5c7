"""Batches with pictures: one step is that of each example alone, and text touches no projector."""

import math
import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llama_adapter import trainer as trainer_module
from llama_adapter.adapter import VISUAL, Adapter
from llama_adapter.checkpoints.quantize import quantize
from llama_adapter.config import AdapterConfig, LlamaConfig, VisualConfig
from llama_adapter.data.examples import IGNORE_INDEX, Batch, Example
from llama_adapter.data.packed import Collated, Prefix, collate, pack
from llama_adapter.model import Llama
from llama_adapter.trainer import Trainer
from llama_adapter.world import World

TEXT = ("prompts", "gates")
WIDTH = 11
# what many begin with, as with a template
FIRST: Prefix = (1, 9, 9, 4, 11, 7, 5)


def features(images: Sequence[str | None]) -> tuple[Tensor, Tensor]:
    """Random numbers by name; for no image NaN, which nothing may look at."""
    rows = [
        torch.full((WIDTH,), math.nan)
        if image is None
        else torch.randn(WIDTH, generator=torch.Generator().manual_seed(ord(image[0])))
        for image in images
    ]
    return torch.stack(rows), torch.tensor([image is not None for image in images])


def examples(count: int, seed: int = 0, every: int = 2) -> tuple[Example, ...]:
    """Random examples that begin alike, of which one of so many is without an image."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        rest = [rng.randrange(3, 353) for _ in range(rng.randint(3, 19))]
        masked = len(FIRST) + rng.randint(1, len(rest) - 1)
        tokens = (*FIRST, *rest)
        labels = (*[IGNORE_INDEX] * masked, *tokens[masked:])
        image = None if index % every == 0 else rng.choice("abc") + ".png"
        made.append(Example(index, tokens, labels, image))
    return tuple(made)


def without_images(batch: Sequence[Example]) -> tuple[Example, ...]:
    return tuple(replace(example, image=None) for example in batch)


@pytest.fixture(params=["late", "early"])
def adapter(tiny_config: LlamaConfig, request: pytest.FixtureRequest) -> Adapter:
    """One that takes images, with random gates, some above 1, and random biases."""
    generator = torch.Generator().manual_seed(13)
    early = {"fusion": "early", "tokens": 3, "layers": 2} if request.param == "early" else {}
    visual = VisualConfig(WIDTH, (7,), **early)
    made = Adapter(AdapterConfig(prompt_length=5), tiny_config, generator=generator, visual=visual)
    assert made.projector is not None
    with torch.no_grad():
        for gates in (made.gates, made.visual_gates):
            if gates is not None:
                gates.normal_(std=1.5, generator=generator)
        for one in made.projector.maps:
            one.bias.normal_(generator=generator)
    return made


def groups_of(adapter: Adapter) -> tuple[str, ...]:
    found = tuple(adapter.groups())
    assert found[:3] == (*TEXT, "projector")
    return found


def alone(model: Llama, adapter: Adapter, batch: Sequence[Example]) -> Tensor:
    """Mean loss, each example by itself in a call without packing."""
    total, count = torch.zeros(()), 0
    for one in batch:
        visual = None
        if one.image is not None:
            visual = adapter.visual_tokens(features([one.image])[0])
        logits = model(torch.tensor([one.tokens]), model.project(adapter, visual))[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(one.labels[1:]), reduction="sum")
        count += one.n_labels
    return total / count


def of_images(name: str) -> bool:
    return any(f".{group}" in name for group in VISUAL)


def state(trainer: Trainer, group: str) -> dict[str, Tensor]:
    """A group's parameters and the state of its optimiser."""
    names = (f"adapter.{group}", f"optimiser.{group}.")
    held = trainer.tensors().items()
    return {name: value.clone() for name, value in held if name.startswith(names)}


@pytest.mark.parametrize("prefixes", [(), (FIRST,)])
@pytest.mark.parametrize("most_tokens", [1, 60, 10**6])
def test_a_step_is_that_of_each_example_alone(
    tiny_model: Llama, adapter: Adapter, most_tokens: int, prefixes: tuple[Prefix, ...]
) -> None:
    other, batch = deepcopy(adapter), examples(9)
    expected = alone(tiny_model, other, batch)
    expected.backward()
    trainer = Trainer(
        tiny_model, adapter, micro_batch_tokens=most_tokens, prefixes=prefixes, features=features
    )
    assert math.isclose(trainer.validate(batch), float(expected.detach()), rel_tol=1e-6)
    loss, _ = trainer.step(Batch(batch, groups_of(adapter)), 0.0)
    assert math.isclose(loss, float(expected.detach()), rel_tol=1e-6)
    for (name, one), two in zip(adapter.named_parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        assert float(two.grad.abs().max()) > 1e-4, name
        assert float((one.grad - two.grad).abs().max()) <= 1e-5 * float(two.grad.abs().max()), name
    # the pictures matter, and which one it is
    with torch.no_grad():
        swapped = [replace(e, image=e.image and "z.png") for e in batch]
        for changed in (without_images(batch), swapped):
            assert abs(trainer.validate(changed) / loss - 1) > 1e-3


def test_beginnings_are_shared_by_those_without_images_alone(
    tiny_model: Llama, adapter: Adapter
) -> None:
    batch = examples(9)
    plain, shared = (pack(batch, "cpu", p, features) for p in ((), (FIRST,)))
    assert sum(example.image is None for example in batch) == 5
    assert len(plain.tokens) - len(shared.tokens) == 4 * len(FIRST)
    assert plain.present is not None
    assert shared.present is not None
    given = [example.image is not None for example in batch]
    assert plain.present.tolist() == given
    # the beginning itself comes first
    assert shared.present.tolist() == [False, *given]
    none = pack(without_images(batch), "cpu", (FIRST,), features)
    assert (none.features, none.present) == (None, None)
    with pytest.raises(ValueError, match=r"must have no image without features, got [abc]\.png"):
        pack(batch)


def test_what_fills_up_rows_has_no_image(
    tiny_model: Llama, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU rows come in multiples; a step is then the same."""
    made: list[Collated] = []

    def filled(batch: Sequence[Example], prefixes: Sequence[Prefix], *rest: object) -> Collated:
        made.append(collate(batch, prefixes, False, 64, features))
        return made[-1]

    found = []
    for many in (False, True):
        if many:
            monkeypatch.setattr(trainer_module, "collate", filled)
        own = deepcopy(adapter)
        trainer = Trainer(
            tiny_model, own, micro_batch_tokens=90, prefixes=(FIRST,), features=features
        )
        # linear_cross_entropy is told that there are no labels to ignore, where none fill up
        monkeypatch.setattr(
            trainer_module,
            "linear_cross_entropy",
            lambda x, w, y, **_: F.cross_entropy(x @ w.T, y, reduction="sum"),
        )
        loss, norm = trainer.step(Batch(examples(9), groups_of(own)), 1e-2)
        found.append((loss, norm, own.state_dict()))
    assert len(made) > 1
    for part in made:
        assert part.computed[0] % 64 == 0
        batch = part.to("cpu")
        assert batch.present is not None
        assert len(batch.present) == len(batch.packing.cu_seqlens) - 1
        assert not batch.present[-1]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_a_batch_of_text_leaves_the_projector_alone(tiny_model: Llama, adapter: Adapter) -> None:
    """No step, no decay, no moments; and the step is that of an adapter without a projector."""
    trainer = Trainer(
        tiny_model, adapter, micro_batch_tokens=60, features=features, weight_decay=0.5
    )
    trainer.step(Batch(examples(5), groups_of(adapter)), 0.1)
    bare = Adapter(adapter.config, tiny_model.config, layers=adapter.layers)
    plain = Trainer(tiny_model, bare, micro_batch_tokens=60, weight_decay=0.5)
    held = {n: value.clone() for n, value in trainer.tensors().items() if not of_images(n)}
    plain.load_tensors(deepcopy(held))
    before = {group: state(trainer, group) for group in groups_of(adapter)[2:]}
    assert len(before["projector"]) == 4 + 4 * 3
    text = without_images(examples(7, seed=4))
    assert trainer.step(Batch(text, groups_of(adapter)), 0.1) == plain.step(Batch(text, TEXT), 0.1)
    for group, one in before.items():
        for name, value in state(trainer, group).items():
            assert torch.equal(value, one[name]), name
    for group in TEXT:
        expected = state(plain, group)
        for name, value in state(trainer, group).items():
            assert torch.equal(value, expected[name]), name
            assert not torch.equal(value, held[name]), name
    with pytest.raises(ValueError, match=r"without images cannot train \('projector',.*\) alone"):
        trainer.step(Batch(text, groups_of(adapter)[2:]), 0.1)


@pytest.mark.parametrize("every", [100, 3])
def test_a_batch_of_pictures_may_train_their_groups_alone(
    tiny_model: Llama, adapter: Adapter, every: int
) -> None:
    trainer = Trainer(
        tiny_model, adapter, micro_batch_tokens=30, features=features, weight_decay=0.5
    )
    trainer.step(Batch(examples(5), groups_of(adapter)), 0.1)
    before = {group: state(trainer, group) for group in groups_of(adapter)}
    # a text among them is a pass that trains nothing
    trainer.step(Batch(examples(7, seed=4, every=every)[1:], groups_of(adapter)[2:]), 0.1)
    for group in groups_of(adapter):
        assert before[group]
        for name, value in state(trainer, group).items():
            assert torch.equal(value, before[group][name]) == (group not in VISUAL), name


def test_features_go_with_the_rows_of_a_share(tiny_model: Llama, adapter: Adapter) -> None:
    """What two processes compute of a batch sums up to what one does."""
    batch, found = examples(9), []
    for size in (1, 2):
        gradients: dict[str, Tensor] = {}
        for rank in range(size):
            own = deepcopy(adapter)
            trainer = Trainer(
                tiny_model,
                own,
                micro_batch_tokens=60,
                prefixes=(FIRST,),
                features=features,
                world=World(rank, size),
            )
            for part in trainer.prepare(Batch(batch, groups_of(adapter))).parts:
                trainer.loss_sum(part).backward()
            for name, parameter in own.named_parameters():
                assert parameter.grad is not None
                gradients[name] = gradients.get(name, 0) + parameter.grad
        found.append(gradients)
    for name, one in found[0].items():
        assert float((one - found[1][name]).abs().max()) <= 1e-5 * float(one.abs().max()), name


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_a_quantised_base_gives_the_gradients_of_its_rounded_weights(
    name: str, even_model: Llama, adapter: Adapter
) -> None:
    pytest.importorskip("torchao.quantization")
    rounded, other = deepcopy(even_model), deepcopy(adapter)
    quantize(even_model, name)
    whole = {"int8": "dequantize", "nf4": "get_original_weight"}[name]
    with torch.no_grad():
        for plain, packed in zip(rounded.parameters(), even_model.parameters(), strict=True):
            changed = type(packed).__module__.startswith("torchao")
            plain.copy_(getattr(packed, whole)() if changed else packed)
    found = []
    for model, own in ((even_model, adapter), (rounded, other)):
        trainer = Trainer(model, own, micro_batch_tokens=90, prefixes=(FIRST,), features=features)
        found.append(trainer.step(Batch(examples(9), groups_of(own)), 0.0)[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    for (group, one), two in zip(adapter.named_parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        error = float((one.grad - two.grad).abs().max()) / float(two.grad.abs().max())
        assert error <= 1e-4, group


@pytest.mark.gpu
def test_a_gpu_takes_the_same_step(tiny_model: Llama, adapter: Adapter) -> None:
    """Rows there come in multiples, and features from pinned memory."""
    found = []
    for device in ("cpu", "cuda"):
        model, own = deepcopy(tiny_model).to(device), deepcopy(adapter).to(device)
        trainer = Trainer(model, own, micro_batch_tokens=90, prefixes=(FIRST,), features=features)
        loss, norm = trainer.step(Batch(examples(9), groups_of(own)), 0.0)
        grads = [x.grad.cpu() for x in own.parameters() if x.grad is not None]
        found.append((loss, norm, grads))
    (loss, norm, grads), (other_loss, other_norm, others) = found
    assert loss == pytest.approx(other_loss, rel=1e-4)
    assert norm == pytest.approx(other_norm, rel=1e-2)
    assert len(grads) == len(others) == len(list(adapter.parameters()))
    for one, two in zip(grads, others, strict=True):
        assert float((one - two).abs().max()) <= 1e-2 * float(one.abs().max())


def test_features_need_a_projector(tiny_model: Llama, tiny_adapter: Adapter) -> None:
    with pytest.raises(ValueError, match="features must be left out: this adapter has no proj"):
        Trainer(tiny_model, tiny_adapter, micro_batch_tokens=9, features=features)
    with pytest.raises(ValueError, match="must have no image without features"):
        Trainer(tiny_model, tiny_adapter, micro_batch_tokens=9).step(Batch(examples(3), TEXT), 0.1)


def test_a_restored_trainer_continues_bitwise(tiny_model: Llama, adapter: Adapter) -> None:
    trainer = Trainer(tiny_model, adapter, micro_batch_tokens=60, features=features)
    for seed in range(3):
        trainer.step(Batch(examples(5, seed), groups_of(adapter)), 0.02)
    held = {name: value.clone() for name, value in trainer.tensors().items()}
    other = Trainer(tiny_model, deepcopy(adapter), micro_batch_tokens=60, features=features)
    other.load_tensors(held)
    for seed in range(3, 6):
        batch = Batch(examples(5, seed), groups_of(adapter))
        assert trainer.step(batch, 0.02) == other.step(batch, 0.02)
    for name, value in trainer.tensors().items():
        assert torch.equal(value, other.tensors()[name]), name
