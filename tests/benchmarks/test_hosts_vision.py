"""The vision worlds of benchmarks.hosts: pictures show what labels say, files are read back."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import CLIPModel, CLIPTokenizer

from benchmarks.ablation_claims import NOT, PARTLY, REPRODUCED, Spread
from benchmarks.hosts_vision_claims import clip_claims, vit_claims
from benchmarks.hosts_vision_clip import CONTEXT
from benchmarks.hosts_vision_domains import (
    CLASSES,
    DOMAINS,
    classes_of,
    draw,
    name_of,
    write_domain,
)
from benchmarks.hosts_vision_models import (
    PREPARATION,
    TEMPLATE,
    as_pixels,
    captions,
    contrast,
    phrase,
    train_clip,
    train_vit,
)
from benchmarks.hosts_vision_pictures import (
    COLOURS,
    NEW_TEXTURES,
    SHAPES,
    SIDE,
    TEXTURES,
    Things,
    as_bytes,
    paint,
    write_png,
)
from benchmarks.hosts_vision_tasks import TASKS, sources
from benchmarks.hosts_vision_vit import QUICK, task_at, write_task
from llama_adapter.tasks.base_to_novel import BASE, NOVEL, BaseToNovelTask
from llama_adapter.tasks.image_pixels import ImageReader


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def things(n: int, shape: torch.Tensor, texture: torch.Tensor) -> Things:
    half = torch.full((n,), SIDE / 2)
    return Things(shape, texture, torch.rand(n, 3), half, half, torch.full((n,), 9.0), half * 0)


def test_every_shape_and_every_texture_looks_different() -> None:
    n, ground = len(SHAPES), torch.full((len(SHAPES), 3, SIDE, SIDE), 0.9)
    shapes = paint(ground, things(n, torch.arange(n), torch.zeros(n, dtype=torch.long)))
    assert shapes.min() >= 0
    assert shapes.max() <= 1
    covered = (shapes - ground).abs().amax(1) > 0.02
    for one, other in itertools.combinations(covered, 2):
        assert (one ^ other).sum() > 10
    n = len(TEXTURES) + len(NEW_TEXTURES)
    ground = torch.zeros(n, 3, SIDE, SIDE)
    square = torch.full((n,), SHAPES.index("square"))
    tones = paint(ground, things(n, square, torch.arange(n))).amax(1)
    tones = tones / tones.amax((1, 2), keepdim=True)
    for one, other in itertools.combinations(tones, 2):
        assert (one - other).abs().mean() > 0.02


def test_only_marked_pictures_are_painted() -> None:
    ground = torch.rand(4, 3, SIDE, SIDE, generator=seeded())
    drawn = torch.tensor([True, False, True, False])
    painted = paint(ground, things(4, torch.arange(4), torch.arange(4)), drawn)
    changed = (painted - ground).abs().amax((1, 2, 3)) > 0.05
    assert torch.equal(changed, drawn)
    assert torch.equal(painted[1], ground[1])


@pytest.mark.parametrize("name", list(TASKS))
def test_labels_are_of_the_classes_and_pictures_of_the_seed(name: str) -> None:
    kind = TASKS[name]
    pictures, labels = kind.draw(200, seeded(3))
    assert pictures.shape == (200, 3, SIDE, SIDE)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert set(labels.tolist()) == set(range(len(kind.classes)))
    again, same = kind.draw(200, seeded(3))
    assert torch.equal(pictures, again)
    assert torch.equal(labels, same)
    assert not torch.equal(pictures, kind.draw(200, seeded(4))[0])


def test_counts_and_places_are_what_the_cells_show() -> None:
    def shown(pictures: torch.Tensor) -> torch.Tensor:
        """How far the middle of each of the 9 cells is from the ground, (B, 9)."""
        ground = pictures.flatten(2).median(-1).values[:, :, None, None]
        far = (pictures - ground).abs().amax(1)
        cells = far.unfold(1, 8, 8).unfold(2, 8, 8)
        return cells.flatten(1, 2).flatten(2).quantile(0.8, dim=-1)

    pictures, labels = TASKS["place"].draw(200, seeded(1))
    assert (shown(pictures).argmax(1) == labels).float().mean() > 0.97
    pictures, labels = TASKS["count"].draw(200, seeded(1))
    found = (shown(pictures) > 0.22).sum(1) - 1
    assert (found - labels).abs().float().mean() < 0.3


def test_vtab_files_hold_the_drawn_pictures(tmp_path: Path) -> None:
    write_task(tmp_path / "tasks" / "scans", "scans", QUICK, 1)
    task = task_at(tmp_path, "scans")
    generator = seeded(1001)
    for items, count in (
        (task.train, QUICK.train),
        (task.validation, QUICK.validation),
        (task.test, QUICK.test),
    ):
        pictures, labels = TASKS["scans"].draw(count, generator)
        assert [one.label for one in items] == labels.tolist()
        pixels = task.images.pixels([one.path for one in items])
        expected = as_pixels(as_bytes(pictures).float() / 255)
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)
    assert task.everything == (*task.train, *task.validation)
    assert task.labels == SHAPES


def test_captions_are_true_of_what_has_all_their_words() -> None:
    _, labels = sources(40, seeded(5))
    texts, true = captions(labels, seeded(6))
    shape, texture, colour = (one.tolist() for one in labels)
    for i in range(40):
        whole = phrase(SHAPES[shape[i]], TEXTURES[texture[i]], list(COLOURS)[colour[i]])
        words = TEMPLATE.format(whole).strip(".").split()
        for j, text in enumerate(texts):
            assert bool(true[i, j]) == (set(text.strip(".").split()) <= set(words))
    assert (len(set(texts)) - 1) > 0


def test_contrast_leaves_other_true_pairs_out() -> None:
    logits = torch.randn(5, 5, generator=seeded(7)) * 3
    true = torch.eye(5, dtype=torch.bool)
    true[0, 3] = true[4, 1] = true[2, 3] = True
    losses = []
    for table, mask in ((logits, true), (logits.T, true.T)):
        for i in range(5):
            kept = [j for j in range(5) if j == i or not mask[i, j]]
            losses.append(torch.logsumexp(table[i, kept], 0) - table[i, i])
    torch.testing.assert_close(contrast(logits, true), torch.stack(losses).mean())


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    train_clip(folder, 2)
    return folder


def test_every_word_is_one_token_and_the_context_is_coops(clip: Path) -> None:
    tokenizer: Any = CLIPTokenizer.from_pretrained(clip)
    for name in (*SHAPES, *TEXTURES, *COLOURS):
        ids = tokenizer(TEMPLATE.format(name))["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids)[1 + CONTEXT :] == [
            f"{name}</w>",
            ".</w>",
            "<|endoftext|>",
        ]
    model: Any = CLIPModel.from_pretrained(clip)
    assert model.config.text_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.text_config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("name", list(DOMAINS))
def test_split_files_hold_the_drawn_pictures_base_and_novel(
    name: str, clip: Path, tmp_path: Path
) -> None:
    write_domain(tmp_path, name, {"train": 3, "val": 1, "test": 2}, 4)
    task, problems = BaseToNovelTask.load(
        tmp_path / f"split_zhou_{name}.json", tmp_path / "images", clip, shots=2, augment=False
    )
    assert problems == []
    names = [name_of(one) for one in classes_of(name)]
    assert len(set(names)) == CLASSES
    assert (*task.names[BASE], *task.names[NOVEL]) == tuple(names)
    assert len(task.train) == CLASSES
    assert len(task.test) == 2 * CLASSES
    reader = ImageReader(PREPARATION)
    paths = [tmp_path / "images" / "train" / f"{i:04d}.png" for i in range(3 * CLASSES)]
    pictures = draw(name, torch.arange(CLASSES).repeat(3), seeded(2004))
    expected = as_pixels(as_bytes(pictures).float() / 255)
    torch.testing.assert_close(reader.pixels(paths), expected, rtol=0, atol=1e-6)
    # the folder's own preparation is the one that pre-training had
    torch.testing.assert_close(task.images.pixels(paths), expected, rtol=0, atol=1e-6)


def test_pretraining_depends_on_its_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, second, other = train_vit(2), train_vit(2), train_vit(2, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    for one, same, different in zip(
        first.parameters(), second.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(one, same)
        assert not one.requires_grad
        assert one.ndim == 1 or not torch.equal(one, different)


def test_pictures_are_written_as_they_are(tmp_path: Path) -> None:
    pictures = torch.rand(2, 3, SIDE, SIDE, generator=seeded(8))
    paths = [tmp_path / "a" / "0.png", tmp_path / "b.png"]
    write_png(pictures, paths)
    expected = as_pixels(as_bytes(pictures).float() / 255)
    torch.testing.assert_close(ImageReader(PREPARATION).pixels(paths), expected, rtol=0, atol=1e-6)


def spread(*values: float) -> Spread:
    return Spread.of(values)


LABELS = {
    name: name
    for name in ("zero_init", "linear", "bias", "adapter", "vpt_deep", "side", "full", "flamingo")
}
PARAMETERS = dict.fromkeys(LABELS, 100) | {"flamingo": 200}


def verdicts(claims: Any) -> list[str]:
    return [claim.verdict for claim in claims]


def test_verdicts_on_vit() -> None:
    worse = dict.fromkeys(LABELS, spread(50, 51)) | {"zero_init": spread(52, 53)}
    groups = {"a": worse, "b": worse, "c": worse}
    tasks = {str(i): worse for i in range(6)}
    assert verdicts(vit_claims(worse, groups, tasks, PARAMETERS, LABELS)) == [REPRODUCED] * 9
    near = worse | {"vpt_deep": spread(51, 53), "full": spread(60, 61), "flamingo": spread(52, 54)}
    groups |= {"c": near}
    tasks |= {"4": worse | {"vpt_deep": spread(60, 61)}, "5": near}
    found = verdicts(vit_claims(near, groups, tasks, PARAMETERS, LABELS))
    assert found == [REPRODUCED, PARTLY, PARTLY, PARTLY, NOT, *[REPRODUCED] * 4]
    better = dict.fromkeys(LABELS, spread(60, 61)) | {"zero_init": spread(52, 53)}
    groups, tasks = dict.fromkeys("abc", better), {str(i): better for i in range(6)}
    found = verdicts(vit_claims(better, groups, tasks, PARAMETERS, LABELS))
    assert found == [*[NOT] * 8, PARTLY]
    found = verdicts(vit_claims(better, groups, tasks, dict.fromkeys(LABELS, 100), LABELS))
    assert found[-1] == NOT


def test_verdicts_on_clip() -> None:
    names = ("zero_init", "both", "frozen", "coop", "vpt_deep", "lora2", "lora4", "flamingo")
    low = dict.fromkeys(names, spread(50, 51)) | {"zero_init": spread(60, 62)}
    parameters = dict.fromkeys(names, 100) | {"flamingo": 101}
    both = low | {"both": spread(60, 61)}
    found = verdicts(clip_claims(both, both, both, parameters, ["lora2", "lora4"]))
    assert found == [REPRODUCED] * 9
    mixed = low | {
        "frozen": spread(61.8, 61.8),
        "coop": spread(55, 61),
        "lora4": spread(55, 60.5),
        "both": spread(59, 59.5),
        "flamingo": spread(70, 71),
    }
    found = verdicts(clip_claims(mixed, mixed, mixed, parameters, ["lora2", "lora4"]))
    assert found == [NOT, PARTLY, REPRODUCED, NOT, PARTLY, PARTLY, PARTLY, NOT, PARTLY]
