"""Images as a gated prompt of their own in the first layers: the formula, in every layout."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llama_adapter.adapter import LANGUAGE, VISUAL, Adapter, Prompts
from llama_adapter.adapter_bank import AdapterBank, RowBank
from llama_adapter.cache import KVCache
from llama_adapter.config import PRESETS, AdapterConfig, LlamaConfig, VisualConfig
from llama_adapter.generation import generate
from llama_adapter.model import Llama
from llama_adapter.packing import Packing
from llama_adapter.sampling import SamplingConfig
from llama_adapter.tokenizer import Tokenizer
from llama_adapter.tuning import LINEARS, Tuning
from tests.llama_adapter.plain_llama import PlainLlama, precise

EARLY = VisualConfig(11, (7,), "gelu", fusion="early", tokens=3, layers=1)
# static prompts beside the images in the first layer, only above them, and two layers of images
FORMS = {
    "both": (EARLY, (0, 1, 3)),
    "apart": (EARLY, (1, 2, 3)),
    "two layers": (replace(EARLY, layers=2, tokens=1), (1, 3)),
}
PRESENT = torch.tensor([True, False, True])
LENGTHS = (21, 9, 17)
EVERYTHING = Tuning(("bias", "scale", "norm"), LINEARS, "output")


def random_adapter(
    config: LlamaConfig,
    visual: VisualConfig,
    layers: tuple[int, ...] | None,
    tuning: Tuning | None = None,
    **settings: str,
) -> Adapter:
    """Random everything, gates beyond one in both kinds of segments."""
    g = torch.Generator().manual_seed(19)
    own = AdapterConfig(prompt_length=5, **settings)
    adapter = Adapter(own, config, layers=layers, generator=g, tuning=tuning, visual=visual)
    with torch.no_grad():
        assert adapter.visual_gates is not None
        for name, parameter in adapter.named_parameters():
            if "gates" in name:
                parameter.normal_(std=1.5, generator=g)
            elif "bias" in name:
                parameter.normal_(std=0.3, generator=g)
            elif name in adapter.tuned_parameters():
                parameter.uniform_(0.5, 1.5, generator=g)
        assert adapter.visual_gates.abs().max() > 1
    return adapter


def features() -> Tensor:
    return torch.randn(3, 11, generator=torch.Generator().manual_seed(2))


def tokens_of(config: LlamaConfig) -> Tensor:
    g = torch.Generator().manual_seed(7)
    return torch.randint(3, config.vocab_size, (3, max(LENGTHS)), generator=g)


def packed_of(ids: Tensor) -> tuple[Tensor, Packing]:
    tokens = torch.cat([row[:length] for row, length in zip(ids, LENGTHS, strict=True)])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    ends = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return tokens, Packing(positions, ends, max(LENGTHS))


@pytest.mark.parametrize("activation", ["tanh", "identity"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_every_layout_is_the_formula(form: str, activation: str, tiny_model: Llama) -> None:
    """Dense, packed, cached in long and short chunks: float64's sums of three softmaxes."""
    visual, layers = FORMS[form]
    adapter = random_adapter(tiny_model.config, visual, layers, gate_activation=activation)
    tokens = adapter.visual_tokens(features(), PRESENT)
    assert tokens.shape == (3, visual.tokens, 48)
    prompts = tiny_model.project(adapter, tokens)
    ids = tokens_of(tiny_model.config)
    plain = PlainLlama(tiny_model, adapter, precise(adapter))
    shown = [tokens[b].double() if PRESENT[b] else None for b in range(3)]
    expected = torch.stack([plain.logits(ids[b], shown[b]) for b in range(3)]).float()
    dense = tiny_model(ids, prompts)
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-5)
    cache = KVCache(tiny_model.config, 3, 64)
    parts = [tiny_model(part, prompts, cache=cache) for part in ids.split([17, 1, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5)
    packed = tiny_model.logits(tiny_model.hidden_packed(*packed_of(ids), prompts))
    rows = [row[:length] for row, length in zip(expected, LENGTHS, strict=True)]
    torch.testing.assert_close(packed, torch.cat(rows), rtol=0, atol=1e-5)
    hidden_from = tiny_model(ids, tiny_model.project(adapter))
    assert (dense[0] - hidden_from[0]).abs().max() > 0.1


@pytest.mark.parametrize("layout", ["dense", "packed", "cached", "mlp", "block"])
@pytest.mark.parametrize("tuning", [None, EVERYTHING], ids=["plain", "tuned"])
@pytest.mark.parametrize("form", ["both", "apart"])
def test_without_an_image_there_is_exactly_nothing(
    form: str, tuning: Tuning | None, layout: str, tiny_model: Llama
) -> None:
    """Bitwise, with biases on wv too, whatever stands in the place of the features."""
    visual, layers = FORMS[form]
    adapter = random_adapter(tiny_model.config, visual, layers, tuning)
    ids, given = tokens_of(tiny_model.config), features()
    given[1] = torch.nan
    recompute = layout if layout in ("mlp", "block") else None

    def run(tokens: Tensor | None) -> tuple[Tensor, ...]:
        prompts = tiny_model.project(adapter, tokens)
        if layout == "dense":
            return tuple(tiny_model(ids, prompts))
        if layout == "cached":
            cache = KVCache(tiny_model.config, 3, 64)
            with torch.no_grad():
                parts = [tiny_model(x, prompts, cache=cache) for x in ids.split([18, 1, 2], 1)]
            return tuple(torch.cat(parts, 1))
        hidden = tiny_model.hidden_packed(*packed_of(ids), prompts, recompute=recompute)
        return hidden.split(LENGTHS)

    absent = torch.zeros(3, dtype=torch.bool)
    # where a gradient is wanted, other operations of the layers run: each is compared with its own
    with torch.no_grad():
        shown, plain = run(adapter.visual_tokens(given, PRESENT)), run(None)
        none = run(adapter.visual_tokens(given, absent))
    assert torch.equal(shown[1], plain[1])
    assert (shown[0] - plain[0]).abs().max() > 0.01
    assert all(torch.equal(a, b) for a, b in zip(none, plain, strict=True))
    if layout != "cached":
        shown, none = (
            run(adapter.visual_tokens(given, PRESENT)),
            run(adapter.visual_tokens(given, absent)),
        )
        assert torch.equal(shown[1], none[1])
        shown[1].square().sum().backward()
        assert adapter.projector is not None
        for parameter in (adapter.visual_gates, *adapter.projector.parameters()):
            assert parameter is not None
            assert parameter.grad is None or not parameter.grad.any()


@pytest.mark.parametrize("recompute", [None, "mlp", "block"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_formula(
    form: str, recompute: str | None, tiny_model: Llama
) -> None:
    """Packed, as training runs, with one sequence without an image and every group trained."""
    visual, layers = FORMS[form]
    adapter = random_adapter(tiny_model.config, visual, layers, EVERYTHING)
    ids = tokens_of(tiny_model.config)
    prompts = tiny_model.project(adapter, adapter.visual_tokens(features(), PRESENT))
    hidden = tiny_model.hidden_packed(*packed_of(ids), prompts, recompute=recompute)
    tiny_model.logits(hidden, prompts).logsumexp(-1).sum().backward()

    values = precise(adapter)
    plain = PlainLlama(tiny_model, adapter, values)
    first, second = (
        (values[f"projector.maps.{n}.weight"], values[f"projector.maps.{n}.bias"]) for n in (0, 1)
    )
    inner = torch.nn.functional.gelu(features().double() @ first[0].T + first[1])
    images = (inner @ second[0].T + second[1]).unflatten(-1, (visual.tokens, -1))
    shown = [images[b] if PRESENT[b] else None for b in range(3)]
    total = torch.stack(
        [plain.logits(ids[b, :n], shown[b]).logsumexp(-1).sum() for b, n in enumerate(LENGTHS)]
    )
    total.sum().backward()
    for name, parameter in adapter.named_parameters():
        expected = values[name].grad
        assert parameter.grad is not None, name
        assert expected is not None
        scale = float(expected.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(
            parameter.grad.double(), expected, rtol=0, atol=2e-5 * scale, msg=name
        )


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_gpu_computes_the_formula_and_its_gradients(form: str, tiny_model: Llama) -> None:
    adapter = random_adapter(tiny_model.config, *FORMS[form])
    values, ids = precise(adapter), tokens_of(tiny_model.config)
    plain = PlainLlama(tiny_model, adapter, values)
    with torch.no_grad():
        tokens = adapter.visual_tokens(features(), PRESENT).double()
    tokens.requires_grad_()
    expected = torch.stack(
        [plain.logits(ids[b], tokens[b] if PRESENT[b] else None) for b in range(3)]
    )
    expected.logsumexp(-1).sum().backward()
    model, adapter = tiny_model.to("cuda"), adapter.to("cuda")
    shown = tokens.detach().float().to("cuda").requires_grad_()
    prompts = model.project(adapter, shown)
    got = model(ids.to("cuda"), prompts)
    torch.testing.assert_close(got.double().cpu(), expected.detach(), rtol=0, atol=1e-4)
    got.logsumexp(-1).sum().backward()
    pairs = [(shown.grad, tokens.grad)]
    for name in ("prompts", "gates", "visual_gates"):
        pairs.append((adapter.get_parameter(name).grad, values[name].grad))
    for ours, theirs in pairs:
        assert ours is not None
        assert theirs is not None
        error = float((ours.double().cpu() - theirs).abs().max())
        assert error <= 1e-3 * float(theirs.abs().max())
    with torch.no_grad():
        cache = KVCache(model.config, 3, 64, device="cuda")
        parts = [model(x, prompts, cache=cache) for x in ids.to("cuda").split([17, 1, 1, 2], 1)]
    torch.testing.assert_close(
        torch.cat(parts, 1).double().cpu(), expected.detach(), rtol=0, atol=1e-4
    )


def test_gates_of_zero_hide_the_image_and_are_the_first_to_learn(tiny_model: Llama) -> None:
    config = tiny_model.config
    adapter = Adapter(AdapterConfig(), config, visual=EARLY)
    assert adapter.layers == (1, 2, 3)
    assert adapter.visual_gates is not None
    assert not adapter.visual_gates.any()
    ids = tokens_of(config)
    with torch.no_grad():
        shown = tiny_model(ids, tiny_model.project(adapter, adapter.visual_tokens(features())))
    assert torch.equal(shown, tiny_model(ids))
    shown = tiny_model(ids, tiny_model.project(adapter, adapter.visual_tokens(features())))
    shown.logsumexp(-1).sum().backward()
    assert adapter.visual_gates.grad is not None
    assert adapter.visual_gates.grad.all()
    assert all(p.grad is None or not p.grad.any() for p in adapter.groups()["projector"])


def test_layers_are_those_above_the_images_unless_told(tiny_model: Llama) -> None:
    config = tiny_model.config
    seven = PRESETS["llama-7b"]
    with torch.device("meta"):
        paper = VisualConfig(6 * 768, fusion="early", tokens=20, layers=1)
        adapter = Adapter(AdapterConfig(), seven, visual=paper)
    assert adapter.layers == tuple(range(1, 32))
    counts = {name: sum(p.numel() for p in ps) for name, ps in adapter.groups().items()}
    # 31 x 10 x 4096 and 31 x 32; 4608 x 64 + 64 and 64 x 81920 + 81920
    assert counts == {
        "prompts": 1_269_760, "gates": 992, "projector": 5_619_776, "visual_gates": 32
    }  # fmt: skip
    assert Adapter(AdapterConfig(n_layers=4), config, visual=EARLY).layers == (0, 1, 2, 3)
    every = replace(EARLY, layers=4)
    assert Adapter(AdapterConfig(), config, visual=every).layers == (3,)
    with pytest.raises(ValueError, match="visual layers must be at most 4, got 5"):
        Adapter(AdapterConfig(), config, visual=replace(EARLY, layers=5))
    scope = Adapter(AdapterConfig(gate_scope="layer"), config, visual=EARLY)
    assert scope.visual_gates is not None
    assert scope.visual_gates.shape == (1, 1)


def test_groups_of_language_and_images_are_all_there_are(tiny_config: LlamaConfig) -> None:
    adapter = random_adapter(tiny_config, EARLY, None, EVERYTHING)
    groups = adapter.groups()
    assert not set(LANGUAGE) & set(VISUAL)
    assert [name for name in groups if name in VISUAL] == ["projector", "visual_gates"]
    assert set(groups) <= {*LANGUAGE, *VISUAL}
    grouped = [id(p) for ps in groups.values() for p in ps]
    assert sorted(grouped) == sorted(id(p) for p in adapter.parameters())


@torch.no_grad()
def test_tokens_of_another_fusion_are_refused(tiny_model: Llama) -> None:
    adapter = random_adapter(tiny_model.config, EARLY, None)
    with pytest.raises(ValueError, match=r"\(B, P, C\) for this early fusion, got \(3, 48\)"):
        tiny_model.project(adapter, torch.randn(3, 48))
    late = Adapter(AdapterConfig(), tiny_model.config, visual=VisualConfig(11))
    with pytest.raises(ValueError, match=r"\(B, C\) for this late fusion, got \(3, 3, 48\)"):
        tiny_model.project(late, torch.randn(3, 3, 48))


@pytest.mark.parametrize("tuning", [None, EVERYTHING], ids=["plain", "tuned"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_the_engine_answers_about_each_text_s_image(
    form: str, tuning: Tuning | None, tiny_model: Llama, tiny_tokenizer: Tokenizer
) -> None:
    """Texts queue, start in chunks and leave at different times; each keeps its own image."""
    adapter = random_adapter(tiny_model.config, *FORMS[form], tuning)
    tokens = adapter.visual_tokens(features(), PRESENT)
    prompts = tiny_model.project(adapter, tokens)
    texts = ["Under a green light seven birds", "Write a response", "paper window of stone, third"]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=11)
    for settings in ({}, {"max_batch": 2, "prefill_chunk": 5}):
        found = generate(tiny_model, tiny_tokenizer, texts, sampling, prompts=prompts, **settings)
        for row, (text, answer) in enumerate(zip(texts, found, strict=True)):
            own = tokens[row : row + 1] if PRESENT[row] else None
            alone, ids = tiny_model.project(adapter, own), tiny_tokenizer.encode(text, bos=True)
            for token in answer.tokens:
                logits = tiny_model(torch.tensor([ids]), alone)[0, -1]
                assert token == int(logits[: tiny_tokenizer.vocab_size].argmax())
                ids.append(token)
    if tuning is None:
        # a tuned model of random numbers says one thing whatever it sees
        plain = tiny_model.project(adapter)
        without = generate(tiny_model, tiny_tokenizer, texts, sampling, prompts=plain)
        differs = [a.tokens != b.tokens for a, b in zip(found, without, strict=True)]
        assert differs == PRESENT.tolist()


@torch.no_grad()
def test_a_bank_serves_the_text_part_and_refuses_images(tiny_model: Llama) -> None:
    adapter = random_adapter(tiny_model.config, EARLY, (1, 3))
    bank = AdapterBank(tiny_model, capacity=1, prompt_length=5, visual_layers=1, visual_tokens=3)
    bank.load("a", adapter)
    ids = tokens_of(tiny_model.config)
    rows = torch.zeros(3, dtype=torch.int32)
    expected = tiny_model(ids, tiny_model.project(adapter))
    got = tiny_model(ids, bank.prompts.of(rows))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    prompts = tiny_model.project(adapter, adapter.visual_tokens(features()))
    both = Prompts(bank.prompts.layers, rows, None, None, prompts.visual, prompts.visual_index)
    with pytest.raises(ValueError, match=r"adapter_index must be None with .* images"):
        RowBank(both, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fusion": "middle"}, r"fusion must be one of \('late', 'early'\), got 'middle'"),
        ({"layers": 1}, "at least 1 for early fusion and 0 for late, got 1 for late"),
        ({"layers": -1}, "at least 1 for early fusion and 0 for late, got -1 for late"),
        ({"fusion": "early"}, "at least 1 for early fusion and 0 for late, got 0 for early"),
        ({"tokens": 0}, "tokens must be from 1 to 65536, got 0"),
        ({"fusion": "early", "layers": 1, "tokens": 0}, "tokens must be from 1 to 65536"),
    ],
)
def test_a_fusion_that_makes_no_sense_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisualConfig(11, **arguments)
