"""The projector has the papers' size, and its token acts as a prompt of one's own."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llama_adapter.adapter import Adapter
from llama_adapter.cache import KVCache
from llama_adapter.config import PRESETS, AdapterConfig, Resampler, VisualConfig
from llama_adapter.model import Llama
from llama_adapter.packing import Packing
from llama_adapter.projector import Projector, QueryProjector, make_projector, projector_shapes
from llama_adapter.tuning import Tuning
from tests.llama_adapter.plain_llama import PlainLlama, precise


def random_projector(features: int, dim: int) -> Projector:
    """One whose biases are not zero either."""
    generator = torch.Generator().manual_seed(5)
    found = Projector(VisualConfig(features, (7, 5), "gelu"), dim, generator=generator)
    for one in found.maps:
        torch.nn.init.normal_(one.bias, generator=generator)
    return found


@pytest.fixture
def visual(tiny_model: Llama) -> Tensor:
    """Tokens of two images, and none for the sequence between them."""
    features = torch.randn(3, 11, generator=torch.Generator().manual_seed(2))
    token = random_projector(11, tiny_model.config.dim)(features)
    return token * torch.tensor([1.0, 0.0, 1.0])[:, None]


def tokens(model: Llama) -> Tensor:
    g = torch.Generator().manual_seed(7)
    return torch.randint(3, model.config.vocab_size, (3, 9), generator=g)


def test_its_size_is_that_of_table_3() -> None:
    with torch.device("meta"):
        projector = Projector(VisualConfig(6 * 768), 4096)
        adapter = Adapter(AdapterConfig(n_layers=30), PRESETS["llama-7b"])
    count = sum(x.numel() for x in projector.parameters())
    assert count == 561_216
    # 1.79 M, "1.8 M"
    assert count + sum(x.numel() for x in adapter.parameters()) == 1_790_976


def test_it_is_the_cascade_of_its_maps() -> None:
    projector = random_projector(11, 13)
    x = torch.randn(3, 11)
    first, second, third = projector.maps
    expected = third(torch.nn.functional.gelu(second(torch.nn.functional.gelu(first(x)))))
    assert torch.equal(projector(x), expected)
    assert projector(x.bfloat16()).dtype == torch.float32
    assert projector(torch.zeros(1, 11)).abs().max() > 0
    (alone,) = Projector(VisualConfig(11, ()), 13).maps
    assert alone.weight.shape == (13, 11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "must be at least 1, got 0 and (64,)"),
        ((3, (5, 0)), "must be at least 1, got 3 and (5, 0)"),
        ((3, (5,), "relu"), "activation must be one of ('silu', 'gelu'), got 'relu'"),
    ],
)
def test_what_is_no_projector_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        VisualConfig(*arguments)


@torch.no_grad()
def test_an_image_is_a_prompt_of_its_own(
    tiny_model: Llama, tiny_adapter: Adapter, visual: Tensor
) -> None:
    """Equation 10 read literally, one sequence after the other; without an image the plain one."""
    ids = tokens(tiny_model)
    got = tiny_model(ids, tiny_model.project(tiny_adapter, visual))
    plain = tiny_model(ids, tiny_model.project(tiny_adapter))
    prompts = tiny_adapter.prompts.clone()
    for row in range(3):
        tiny_adapter.prompts.copy_(prompts + visual[row])
        alone = tiny_model(ids[row : row + 1], tiny_model.project(tiny_adapter))
        torch.testing.assert_close(got[row : row + 1], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(got[1], plain[1], rtol=0, atol=1e-5)
    assert (got[0] - plain[0]).abs().max() > 0.01


def test_features_are_checked_and_what_is_not_there_is_not_looked_at(tiny_model: Llama) -> None:
    config, visual = AdapterConfig(n_layers=2), VisualConfig(11, (7,))
    adapter = Adapter(config, tiny_model.config, visual=visual)
    features = torch.randn(3, 11)
    token = adapter.visual_tokens(features)
    features[1] = torch.nan
    got = adapter.visual_tokens(features, torch.tensor([True, False, True]))
    assert torch.equal(got[::2], token[::2])
    assert not got[1].any()
    got.square().sum().backward()
    assert all(
        x.grad is not None and x.grad.isfinite().all() for x in adapter.groups()["projector"]
    )
    with pytest.raises(ValueError, match=r"features must have shape \(B, 11\), got \(3, 10\)"):
        adapter.visual_tokens(features[:, :10])
    with pytest.raises(ValueError, match="this adapter has no projector"):
        Adapter(config, tiny_model.config).visual_tokens(features)
    with pytest.raises(ValueError, match="visual needs layers with prompts, got none"):
        Adapter(config, tiny_model.config, layers=(), tuning=Tuning(("norm",)), visual=visual)


def test_packed_sequences_have_their_own_images_too(
    tiny_model: Llama, tiny_adapter: Adapter, visual: Tensor
) -> None:
    ids, lengths = tokens(tiny_model), (9, 4, 7)
    packed = torch.cat([row[:length] for row, length in zip(ids, lengths, strict=True)])
    positions = torch.cat([torch.arange(length) for length in lengths])
    ends = torch.tensor([0, 9, 13, 20], dtype=torch.int32)
    prompts = tiny_model.project(tiny_adapter, visual)
    hidden = tiny_model.hidden_packed(packed, Packing(positions, ends, 9), prompts)
    dense = tiny_model.hidden(ids, prompts)
    expected = torch.cat([row[:length] for row, length in zip(dense, lengths, strict=True)])
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)


def test_with_gates_of_zero_the_image_changes_nothing_and_learns_nothing_yet(
    tiny_model: Llama, visual: Tensor
) -> None:
    config = AdapterConfig(prompt_length=3, n_layers=2)
    adapter = Adapter(config, replace(tiny_model.config))
    projector = random_projector(11, tiny_model.config.dim)
    tiny_model.requires_grad_(False)
    features = torch.randn(3, 11, generator=torch.Generator().manual_seed(2))
    ids = tokens(tiny_model)
    with torch.no_grad():
        shown = tiny_model(ids, tiny_model.project(adapter, projector(features)))
    assert torch.equal(shown, tiny_model(ids))
    logits = tiny_model(ids, tiny_model.project(adapter, projector(features)))
    logits.logsumexp(-1).sum().backward()
    assert adapter.gates.grad is not None
    assert adapter.gates.grad.abs().max() > 0
    for parameter in (adapter.prompts, *projector.parameters()):
        assert parameter.grad is None or not parameter.grad.any()
    with torch.no_grad():
        adapter.gates.normal_(std=1.5)
    tiny_model(ids, tiny_model.project(adapter, projector(features))).logsumexp(-1).sum().backward()
    for parameter in (adapter.prompts, *projector.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


QUERIES = VisualConfig(4 * 9, (), "gelu", tokens=5, resampler=Resampler(9, 32, 2, 4))
RELEASED = VisualConfig(257 * 768, (), "gelu", tokens=10, resampler=Resampler())


def test_the_released_form_has_the_released_numbers() -> None:
    with torch.device("meta"):
        adapter = Adapter(AdapterConfig(n_layers=31), PRESETS["llama-7b"], visual=RELEASED)
    counts = {name: sum(p.numel() for p in ps) for name, ps in adapter.groups().items()}
    assert counts == {"prompts": 1_269_760, "gates": 992, "projector": 60_460_800}
    # the official code also counts a gate of the first layer, which has no prompt
    assert sum(counts.values()) + 32 == 61_731_584


@pytest.mark.parametrize(
    "config",
    [
        QUERIES,
        replace(QUERIES, fusion="early", tokens=3, layers=2),
        replace(QUERIES, tokens=1),
        VisualConfig(11, (7, 5)),
        VisualConfig(11, (), tokens=5),
        VisualConfig(11, (7,), fusion="early", tokens=3, layers=1),
    ],
)
def test_shapes_are_those_of_the_module_and_of_its_tokens(config: VisualConfig) -> None:
    before = torch.get_rng_state()
    projector = make_projector(config, 48, generator=torch.Generator().manual_seed(1))
    again = make_projector(config, 48, generator=torch.Generator().manual_seed(1))
    if config.resampler is not None:
        assert isinstance(projector, QueryProjector)
        assert torch.equal(torch.get_rng_state(), before)
    shapes = {name: tuple(p.shape) for name, p in projector.named_parameters()}
    assert projector_shapes(config, 48) == shapes
    for name, value in again.named_parameters():
        assert torch.equal(value, projector.get_parameter(name))
    got = projector(torch.randn(2, config.features).bfloat16())
    assert got.shape == ((2, 48) if config.single else (2, config.tokens, 48))
    assert got.dtype == torch.float32
    assert got.std() > 0.1


@pytest.mark.parametrize("kind", ["queries", "cascade"])
def test_a_token_for_each_prompt_row_is_added_to_its_own(kind: str, tiny_model: Llama) -> None:
    """In every layout, with gradients; the sequence between has no image."""
    config = QUERIES if kind == "queries" else VisualConfig(36, (7,), tokens=5)
    g = torch.Generator().manual_seed(3)
    settings = AdapterConfig(prompt_length=5, n_layers=2)
    adapter = Adapter(settings, tiny_model.config, generator=g, visual=config)
    with torch.no_grad():
        adapter.gates.normal_(std=1.5, generator=g)
    features, present = torch.randn(3, 36, generator=g), torch.tensor([True, False, True])
    visual = adapter.visual_tokens(features, present)
    assert visual.shape == (3, 5, 48)
    assert not visual[1].any()
    prompts, ids = tiny_model.project(adapter, visual), tokens(tiny_model)
    plain = PlainLlama(tiny_model, adapter, precise(adapter))
    expected = torch.stack([plain.logits(ids[b], visual[b].double()) for b in range(3)])
    dense = tiny_model(ids, prompts)
    torch.testing.assert_close(dense.double(), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        cache = KVCache(tiny_model.config, 3, 64)
        parts = [tiny_model(x, prompts, cache=cache) for x in ids.split([7, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1).double(), expected, rtol=0, atol=1e-5)
    ends = torch.tensor([0, 9, 18, 27], dtype=torch.int32)
    packing = Packing(torch.arange(9).repeat(3), ends, 9)
    hidden = tiny_model.hidden_packed(ids.flatten(), packing, prompts)
    packed = tiny_model.logits(hidden).view_as(expected)
    torch.testing.assert_close(packed.double(), expected, rtol=0, atol=1e-5)
    packed.logsumexp(-1).sum().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resampler": Resampler(5, 32, 2, 4)}, "features a multiple of its inputs 5, got () and"),
        ({"hidden": (64,)}, "hidden must be empty with a resampler, and features a"),
    ],
)
def test_what_is_no_resampler_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(QUERIES, **arguments)
    with pytest.raises(ValueError, match="heads divide width, got 9, 32, 2 and 5"):
        Resampler(9, 32, 2, 5)
    # of a file's header, before its tensors are counted
    with pytest.raises(ValueError, match="blocks must be at most 1024, got 1000000000"):
        Resampler(2, 16, 1_000_000_000, 2)


def test_as_many_tokens_as_rows_or_one(tiny_model: Llama) -> None:
    with pytest.raises(ValueError, match="must be 1 or one for each of the 10 prompt rows, got 5"):
        Adapter(AdapterConfig(), tiny_model.config, visual=QUERIES)
