"""A CLIP learns of a few base images and is asked for base and novel ones, as in CoCoOp."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llama_adapter.hosts import adapt, unadapt
from llama_adapter.hosts.methods import MethodOptions, attach
from llama_adapter.tasks.base_to_novel import (
    BASE,
    HARMONIC,
    NOVEL,
    BaseToNovelTask,
    averages,
    harmonic_mean,
    load_coop,
)
from llama_adapter.tasks.image_pixels import CLIP, ImageCache, Preparation
from llama_adapter.tasks.task import Task
from tests.llama_adapter.tasks.image_hosts import SIDE, random_clip, save_clip, write_split

COUNTS = {"train": 35, "val": 25, "test": 15}
# Table 11 of LLaMA-Adapter, its last row: base, novel and harmonic mean of three data sets
ZERO = ((76.70, 71.00, 73.74), (98.10, 94.53, 96.28), (96.00, 74.67, 84.00))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP, and pictures of five classes."""
    found = tmp_path_factory.mktemp("coop")
    save_clip(found / "clip")
    write_split(found, 5, COUNTS)
    return found


def load(folder: Path, **options: Any) -> BaseToNovelTask:
    task, problems = BaseToNovelTask.load(
        folder / "split_zhou_Own.json", folder / "images", folder / "clip", **options
    )
    assert not problems
    return task


def expected_logits(model: Any, task: BaseToNovelTask, items: Any, half: str) -> torch.Tensor:
    """What transformers' own forward says of images and texts together."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(task_folder(task) / "clip")
    texts = [f"a photo of a {name.replace('_', ' ')}." for name in task.names[half]]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        pixels = task.images.pixels([one.path for one in items])
        return model(**tokens, pixel_values=pixels).logits_per_image


def task_folder(task: BaseToNovelTask) -> Path:
    return Path(task.test[0].path).parents[2]


def test_the_protocol(folder: Path) -> None:
    task = load(folder, shots=6)
    checked: Task = task
    assert (checked.kind, checked.labels, checked.metric) == ("contrastive", (), "base")
    assert task.names == {
        "base": ("class_a", "class_b", "class_c"),
        "novel": ("class_d", "class_e"),
    }
    assert [one.label for one in task.train] == [0] * 6 + [1] * 6 + [2] * 6
    # as many as there are shots, and no more than four
    assert [one.label for one in task.validation] == [0] * 4 + [1] * 4 + [2] * 4
    assert not any(one.novel for one in (*task.train, *task.validation))
    assert [(one.label, one.novel) for one in task.test] == [
        *[(n, False) for _ in range(3) for n in range(3)],
        *[(n, True) for _ in range(3) for n in range(2)],
    ]
    assert len({one.id for one in (*task.train, *task.validation, *task.test)}) == 18 + 12 + 15
    assert len(load(folder, shots=2).validation) == 6


def test_a_seed_draws_the_same_shots_and_another_others(folder: Path) -> None:
    assert load(folder, shots=3, seed=4).train == load(folder, shots=3, seed=4).train
    assert load(folder, shots=3, seed=4).train != load(folder, shots=3, seed=5).train
    # with no more images than shots there is nothing to draw
    assert {one.id for one in load(folder).train} == {one.id for one in load(folder, seed=9).train}


def test_logits_are_transformers_own_with_the_texts_of_one_half(folder: Path) -> None:
    task, model = load(folder, augment=False), random_clip()
    base = [one for one in task.test if not one.novel]
    novel = [one for one in task.test if one.novel]
    for half, items in ((BASE, base), (NOVEL, novel)):
        with torch.no_grad():
            got = task.logits(model, task.images.pixels([one.path for one in items]), half)
        expected = expected_logits(model, task, items, half)
        assert got.shape == (len(items), len(task.names[half]))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    labels = torch.tensor([one.label for one in base])
    torch.testing.assert_close(
        task.loss(model, base), F.cross_entropy(expected_logits(model, task, base, BASE), labels)
    )


def test_other_braces_of_a_template_are_its_own(folder: Path) -> None:
    texts = load(folder, template="a {} of {x} {").texts[BASE].texts
    assert texts == ("a class a of {x} {", "a class b of {x} {", "a class c of {x} {")


def test_predictions_keep_the_order_of_mixed_items(folder: Path) -> None:
    task, model = load(folder), random_clip().train()
    mixed = [*task.test[::2], *task.test[1::2]][::-1]
    got = task.predict(model, mixed)
    assert model.training
    model.eval()
    expected = [
        int(expected_logits(model, task, [one], NOVEL if one.novel else BASE).argmax())
        for one in mixed
    ]
    assert got == expected
    assert len(set(got)) > 1


def test_scores_of_either_half_and_their_harmonic_mean(folder: Path) -> None:
    task = load(folder)
    right = [one.label for one in task.test]
    assert task.score(task.test, right) == {BASE: 100.0, NOVEL: 100.0, HARMONIC: 100.0}
    # 3 of 9 base images, 3 of 6 novel ones
    found = task.score(task.test, [0] * len(right))
    assert abs(found[BASE] - 100 / 3) < 1e-9
    assert found[NOVEL] == 50.0
    assert abs(found[HARMONIC] - 40.0) < 1e-9
    assert task.score(task.validation, [0] * len(task.validation)) == {BASE: pytest.approx(100 / 3)}
    with pytest.raises(ValueError, match="one for each of 15 items"):
        task.score(task.test, right[:-1])


def test_table_11_averages_the_harmonic_means() -> None:
    for base, novel, mean in ZERO:
        assert abs(harmonic_mean(base, novel) - mean) < 0.006
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert harmonic_mean(0.0, 80.0) == 0.0
    found = averages([{BASE: base, NOVEL: novel} for base, novel, _ in ZERO])
    assert {key: round(value, 2) for key, value in found.items()} == {
        BASE: 90.27, NOVEL: 80.07, HARMONIC: 84.67
    }  # fmt: skip
    # that of the means is another
    assert round(harmonic_mean(found[BASE], found[NOVEL]), 2) == 84.86
    with pytest.raises(ValueError, match="at least one data set"):
        averages([])


class Counted:
    """How many texts a CLIP's text encoder is given."""

    def __init__(self, model: Any) -> None:
        self.texts: list[int] = []
        model.text_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        self.texts.append(len(kwargs["input_ids"]))


def test_texts_of_a_frozen_text_side_are_encoded_once(folder: Path) -> None:
    task, model = load(folder), random_clip()
    model.requires_grad_(False)
    model.vision_model.requires_grad_(True)
    counted = Counted(model)
    optimizer = torch.optim.SGD(model.vision_model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        task.loss(model, task.train[:4]).backward()
        optimizer.step()
    # the first text tells that they are as before
    assert counted.texts == [1, 3, 1, 1]
    task.predict(model, task.test)
    assert counted.texts[4:] == [1, 1, 2]


@pytest.mark.parametrize("trained", ["text_model", "text_projection"])
def test_texts_of_a_trained_text_side_are_encoded_anew(folder: Path, trained: str) -> None:
    """Their gradients reach it at every step, and evaluation in between sees what it has become."""
    task, model = load(folder, augment=False), random_clip()
    model.requires_grad_(False)
    part = getattr(model, trained).requires_grad_(True)
    optimizer = torch.optim.SGD(part.parameters(), lr=0.5)
    base = [one for one in task.test if not one.novel]
    task.predict(model, task.test)
    for _ in range(3):
        optimizer.zero_grad()
        loss = task.loss(model, base)
        labels = torch.tensor([one.label for one in base])
        expected = F.cross_entropy(expected_logits(model, task, base, BASE), labels)
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=1e-5)
        loss.backward()
        assert all(
            one.grad is not None and bool(one.grad.any())
            for name, one in part.named_parameters()
            # no difference of keys' biases is a difference of attention
            if not name.endswith(("k_proj.bias", "position_embedding.weight"))
        )
        optimizer.step()
        with torch.no_grad():
            pixels = task.images.pixels([one.path for one in base])
            got = task.logits(model, pixels, BASE)
        torch.testing.assert_close(
            got, expected_logits(model, task, base, BASE), rtol=1e-5, atol=1e-5
        )


def with_gates(model: Any, encoder: str) -> Any:
    """An adapter on one encoder with random gates per head, some above 1."""
    g = torch.Generator().manual_seed(4)
    adapter = adapt(model, prompt_length=3, encoder=encoder, generator=g)
    with torch.no_grad():
        adapter.gates.normal_(std=1.5, generator=g)
    return adapter


def test_prompts_in_the_visual_encoder_leave_the_texts_as_they_are(folder: Path) -> None:
    task, model = load(folder), random_clip()
    adapter = with_gates(model, "visual")
    counted = Counted(model)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        task.loss(model, task.train).backward()
        assert adapter.prompts.grad is not None
        assert all(bool(row.any()) for row in adapter.prompts.grad)
        optimizer.step()
    assert counted.texts == [1, 3, 1, 1]
    base = [one for one in task.test if not one.novel]
    with torch.no_grad():
        got = task.logits(model, task.images.pixels([one.path for one in base]), BASE)
    torch.testing.assert_close(got, expected_logits(model, task, base, BASE), rtol=1e-5, atol=1e-5)


def test_prompts_in_the_text_encoder_are_trained_and_seen(folder: Path) -> None:
    """A kept text would train nothing, and would tell of the prompts before they were trained."""
    task, model = load(folder, augment=False), random_clip()
    adapter = with_gates(model, "text")
    base = [one for one in task.test if not one.novel]
    pixels = task.images.pixels([one.path for one in base])
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    seen = []
    for _ in range(3):
        with torch.no_grad():
            seen.append(task.logits(model, pixels, BASE))
        expected = expected_logits(model, task, base, BASE)
        torch.testing.assert_close(seen[-1], expected, rtol=1e-5, atol=1e-5)
        optimizer.zero_grad()
        task.loss(model, task.train).backward()
        assert adapter.prompts.grad is not None
        assert all(bool(row.any()) for row in adapter.prompts.grad)
        optimizer.step()
    assert (seen[0] - seen[1]).abs().max() > 1e-4
    unadapt(model, encoder="text")
    got = task.logits(model, pixels, BASE)
    torch.testing.assert_close(
        got.detach(), expected_logits(random_clip(), task, base, BASE), rtol=1e-5, atol=1e-5
    )


def test_words_that_the_first_text_lacks_are_seen_when_they_change(folder: Path) -> None:
    """The first text alone is looked at, and a state that is loaded needs no gradient."""
    task, model = load(folder), random_clip()
    made, texts = attach(model, "full", MethodOptions(encoders=("text",))), task.texts[BASE]
    state, ids = made.state_dict(), texts._inputs["input_ids"]
    (table,) = (value for name, value in state.items() if "token_embedding" in name)
    others = [n for n in ids[1].tolist() if n not in ids[0].tolist()]
    with torch.no_grad():
        before = texts(model)
        table[others] = torch.randn_like(table[others])
        made.load_state_dict(state)
        after = texts(model)
    assert others
    assert torch.equal(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-4


def test_a_learnt_context_is_seen_as_it_is_learnt(folder: Path) -> None:
    task, model = load(folder, augment=False), random_clip()
    base = [one for one in task.test if not one.novel]
    pixels = task.images.pixels([one.path for one in base])
    plain = task.logits(model, pixels, BASE).detach()
    # a letter is a token of this CLIP: "a photo of a" has nine
    options = MethodOptions(prompt_length=4, template_length=9)
    attached = attach(model, "coop", options, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(attached.parameters().values(), lr=0.02)
    seen = []
    for _ in range(3):
        with torch.no_grad():
            seen.append(task.logits(model, pixels, BASE))
        optimizer.zero_grad()
        task.loss(model, task.train).backward()
        assert all(
            one.grad is not None and bool(one.grad.any()) for one in attached.parameters().values()
        )
        optimizer.step()
    for before, after in ((plain, seen[0]), (seen[0], seen[1]), (seen[1], seen[2])):
        assert (before - after).abs().max() > 1e-4
    attached.detach()
    assert torch.equal(task.logits(model, pixels, BASE), plain)


def test_texts_are_anew_where_a_hook_or_another_model_changes_them(folder: Path) -> None:
    """Neither is a change of a parameter."""
    task, model = load(folder), random_clip().requires_grad_(False)
    base = [one for one in task.test if not one.novel]
    pixels = task.images.pixels([one.path for one in base])

    def shift(module: Any, args: Any, out: Any) -> Any:
        return out + torch.linspace(-1, 1, out.shape[-1])

    plain = task.logits(model, pixels, BASE)
    handle = model.text_model.embeddings.register_forward_hook(shift)
    shifted = task.logits(model, pixels, BASE)
    torch.testing.assert_close(shifted, expected_logits(model, task, base, BASE))
    assert (shifted - plain).abs().max() > 1e-3
    handle.remove()
    assert torch.equal(task.logits(model, pixels, BASE), plain)
    other = random_clip(seed=8).requires_grad_(False)
    torch.testing.assert_close(
        task.logits(other, pixels, BASE), expected_logits(other, task, base, BASE)
    )


def test_training_takes_random_pieces_that_torchs_seed_decides(folder: Path) -> None:
    task, model = load(folder, cache=ImageCache()), random_clip()
    torch.manual_seed(3)
    first, second = task.loss(model, task.train).item(), task.loss(model, task.train).item()
    torch.manual_seed(3)
    assert task.loss(model, task.train).item() == first != second
    plain = load(folder, augment=False)
    assert plain.loss(model, plain.train).item() == plain.loss(model, plain.train).item()


def test_the_preparation_is_the_folders_or_clips_or_ones_own(folder: Path, tmp_path: Path) -> None:
    assert load(folder).images.preparation == Preparation(
        (SIDE, SIDE), SIDE, "bicubic", CLIP.mean, CLIP.std
    )
    own = Preparation((SIDE, SIDE))
    assert load(folder, preparation=own).images.preparation is own


def test_one_of_the_eleven_by_its_name(folder: Path, tmp_path: Path) -> None:
    path = write_split(tmp_path / "oxford_flowers", 3, {"train": 6, "val": 3, "test": 3})
    (path.parent / "images").rename(path.parent / "jpg")
    path.rename(path.parent / "split_zhou_OxfordFlowers.json")
    task, problems = load_coop(tmp_path, "OxfordFlowers", folder / "clip", shots=1)
    assert not problems
    assert task.texts[NOVEL].texts == ("a photo of a class c, a type of flower.",)
    with pytest.raises(ValueError, match=r"name must be one of ImageNet, .*got 'Flowers'"):
        load_coop(tmp_path, "Flowers", folder / "clip")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shots": 0}, "shots must be at least 1, got 0"),
        ({"template": "a photo."}, "template must have one {} for a class's name, got 'a photo.'"),
        ({"template": "a {} of a {}."}, "template must have one {}"),
    ],
)
def test_settings_without_a_sense_are_refused(
    options: dict[str, Any], reason: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        load(folder, **options)


def test_one_class_has_no_other_half(folder: Path, tmp_path: Path) -> None:
    path = write_split(tmp_path, 1, {"train": 2, "val": 1, "test": 1})
    with pytest.raises(ValueError, match="classes must be at least 2, got 1"):
        BaseToNovelTask.load(path, tmp_path / "images", folder / "clip")


def test_a_folder_without_a_tokenizer_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent must be a folder that transformers"):
        load_with(folder, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no tokenizer: none of tokenizer.json"):
        load_with(folder, tmp_path / "empty")
    # from a configuration alone transformers would make one that knows no word
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / "empty" / name).write_bytes((folder / "clip" / name).read_bytes())
    with pytest.raises(ValueError, match=r"empty holds no tokenizer: none of tokenizer.json"):
        load_with(folder, tmp_path / "empty")


def test_without_transformers_the_remedy_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'llama-adapter-kernels\[hf\]'") as caught:
        load_with(folder, folder / "clip")
    assert "\n" not in str(caught.value)


def load_with(folder: Path, clip: Path) -> Any:
    return BaseToNovelTask.load(folder / "split_zhou_Own.json", folder / "images", clip)


def test_a_text_beyond_the_positions_is_named(folder: Path) -> None:
    task = load(folder, template="a photo of " + "a very " * 12 + "{}.")
    with pytest.raises(ValueError, match=r"text 'a photo of .*' must have at most 64 tokens, got"):
        task.loss(random_clip(), task.train)
