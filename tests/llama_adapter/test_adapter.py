"""Does an adapter start as the base model, learn from the first step, and leave the base alone?"""

import pytest
import torch
from torch import Tensor

from adapter_kernels import linear_cross_entropy
from llama_adapter.adapter import Adapter, LayerPrompt, Prompts
from llama_adapter.cache import KVCache
from llama_adapter.config import PRESETS, AdapterConfig, LlamaConfig
from llama_adapter.model import Llama
from llama_adapter.tuning import LINEARS, Tuning


def random_tokens(config: LlamaConfig, batch: int, count: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (batch, count), generator=generator)


def loss_of(model: Llama, adapter: Adapter, tokens: Tensor) -> Tensor:
    """The training loss, as the fine-tuning loop computes it."""
    hidden = model.hidden(tokens, model.project(adapter))
    return linear_cross_entropy(hidden[:, :-1], model.output_weight, tokens[:, 1:])


def test_new_adapter_has_standard_normal_prompts_and_zero_gates(tiny_config: LlamaConfig) -> None:
    generator = torch.Generator().manual_seed(1)
    adapter = Adapter(AdapterConfig(prompt_length=101), tiny_config, generator=generator)
    assert adapter.layers == (2, 3)
    assert adapter.prompts.shape == (2, 101, 48)
    assert adapter.gates.shape == (2, 6)
    assert torch.count_nonzero(adapter.gates) == 0
    # 9,696 numbers: four standard errors of their mean and of their deviation
    assert abs(adapter.prompts.mean()) < 4 / 9696**0.5
    assert abs(adapter.prompts.std() - 1) < 4 / (2 * 9696) ** 0.5


def test_prompt_std_scales_the_same_random_numbers(tiny_config: LlamaConfig) -> None:
    first, second = (
        Adapter(
            AdapterConfig(prompt_std=std), tiny_config, generator=torch.Generator().manual_seed(1)
        )
        for std in (1.0, 0.125)
    )
    assert torch.equal(second.prompts, first.prompts * 0.125)


@pytest.mark.parametrize("activation", ["tanh", "identity"])
@pytest.mark.parametrize("scope", ["head", "layer"])
def test_multipliers_follow_activation_and_scope(
    activation: str, scope: str, tiny_config: LlamaConfig
) -> None:
    settings = AdapterConfig(gate_activation=activation, gate_scope=scope)
    adapter = Adapter(settings, tiny_config)
    with torch.no_grad():
        adapter.gates.normal_(std=1.5)
    gates = adapter.gates.expand(2, 6)
    expected = gates.tanh() if activation == "tanh" else gates
    assert torch.equal(adapter.multipliers(), expected)
    assert adapter.gates.shape == ((2, 6) if scope == "head" else (2, 1))


def test_groups_hold_every_parameter_once(tiny_adapter: Adapter) -> None:
    groups = tiny_adapter.groups()
    assert list(groups) == ["prompts", "gates"]
    parameters = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(parameters) == sorted(id(parameter) for parameter in tiny_adapter.parameters())


@pytest.mark.parametrize("layers", [(3, 1), (1, 1), (0, 4), (-1, 2), ()])
def test_impossible_layers_are_refused(layers: tuple[int, ...], tiny_config: LlamaConfig) -> None:
    with pytest.raises(ValueError, match="layers must be ascending indices below 4, got"):
        Adapter(AdapterConfig(), tiny_config, layers=layers)


@torch.no_grad()
def test_explicit_layers_act_where_they_say(tiny_config: LlamaConfig, tiny_model: Llama) -> None:
    adapter = Adapter(AdapterConfig(), tiny_config, layers=(0, 2))
    adapter.gates.fill_(1.3)
    assert sorted(tiny_model.project(adapter).layers) == [0, 2]


@torch.no_grad()
def test_zero_gates_are_bitwise_the_base(tiny_model: Llama, tiny_config: LlamaConfig) -> None:
    prompts = tiny_model.project(Adapter(AdapterConfig(n_layers=4), tiny_config))
    tokens = random_tokens(tiny_config, 3, 37)
    assert torch.equal(tiny_model(tokens, prompts), tiny_model(tokens))
    base_cache, cache = KVCache(tiny_config, 3, 64), KVCache(tiny_config, 3, 64)
    # 20 tokens take the packed attention, 16 and 1 the decoding one
    for start, end in ((0, 20), (20, 36), (36, 37)):
        chunk = tokens[:, start:end]
        base = tiny_model(chunk, cache=base_cache)
        assert torch.equal(tiny_model(chunk, prompts, cache=cache), base)
    assert torch.equal(cache.k, base_cache.k)
    assert torch.equal(cache.v, base_cache.v)


def test_first_step_moves_gates_and_not_prompts(
    tiny_model: Llama, tiny_config: LlamaConfig
) -> None:
    adapter = Adapter(AdapterConfig(), tiny_config)
    loss_of(tiny_model, adapter, random_tokens(tiny_config, 2, 19)).backward()
    assert adapter.gates.grad is not None
    assert adapter.prompts.grad is not None
    assert torch.all(adapter.gates.grad != 0)
    assert torch.count_nonzero(adapter.prompts.grad) == 0


def test_prompts_learn_after_a_forward_without_gradients(
    tiny_model: Llama, tiny_adapter: Adapter, tiny_config: LlamaConfig
) -> None:
    """Prompt keys kept from a first validation pass once left the prompts without a gradient."""
    tokens = random_tokens(tiny_config, 2, 19)
    with torch.no_grad():
        before = loss_of(tiny_model, tiny_adapter, tokens)
    loss = loss_of(tiny_model, tiny_adapter, tokens)
    loss.backward()
    assert torch.equal(loss.detach(), before)
    grad = tiny_adapter.prompts.grad
    assert grad is not None
    assert torch.all(grad.flatten(1).norm(dim=1) > 1e-4)


def test_gradients_are_the_slopes_of_the_loss(
    tiny_model: Llama, tiny_adapter: Adapter, tiny_config: LlamaConfig
) -> None:
    tokens = random_tokens(tiny_config, 2, 19)
    generator = torch.Generator().manual_seed(2)
    loss_of(tiny_model, tiny_adapter, tokens).backward()
    for parameter in (tiny_adapter.prompts, tiny_adapter.gates):
        grad = parameter.grad
        assert grad is not None
        # mostly uphill, so that the loss moves more than float32 rounds
        random = torch.randn(parameter.shape, generator=generator)
        direction = grad / grad.norm() + 0.5 * random / random.norm()
        start = parameter.data.clone()
        losses = []
        for step in (0.02, -0.02):
            parameter.data = start + step * direction
            losses.append(loss_of(tiny_model, tiny_adapter, tokens).item())
        parameter.data = start
        slope = (losses[0] - losses[1]) / 0.04
        assert slope == pytest.approx((grad * direction).sum().item(), rel=2e-3)


def test_projections_follow_an_optimiser_step(
    tiny_model: Llama, tiny_adapter: Adapter, tiny_config: LlamaConfig
) -> None:
    tokens = random_tokens(tiny_config, 2, 19)
    old = tiny_model.project(tiny_adapter).layers
    optimizer = torch.optim.SGD(tiny_adapter.parameters(), lr=1.0)
    before = loss_of(tiny_model, tiny_adapter, tokens)
    before.backward()
    optimizer.step()
    new = tiny_model.project(tiny_adapter).layers
    for layer, row in zip((2, 3), (0, 1), strict=True):
        attention = tiny_model.layers[layer].attention
        prompt = tiny_adapter.prompts[row]
        assert not torch.equal(new[layer].k, old[layer].k)
        assert torch.equal(new[layer].k.flatten(1), prompt @ attention.wk.weight.T)
        assert torch.equal(new[layer].v.flatten(1), prompt @ attention.wv.weight.T)
        assert torch.equal(new[layer].gate, tiny_adapter.gates[row].tanh())
    assert loss_of(tiny_model, tiny_adapter, tokens) < before


def test_base_gets_no_gradient(
    tiny_model: Llama, tiny_adapter: Adapter, tiny_config: LlamaConfig
) -> None:
    weights = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    optimizer = torch.optim.AdamW(tiny_adapter.parameters(), lr=0.1)
    for _ in range(3):
        loss_of(tiny_model, tiny_adapter, random_tokens(tiny_config, 2, 19)).backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(value, weights[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_stays_float32_on_a_half_precision_base(
    dtype: torch.dtype, tiny_model: Llama, tiny_adapter: Adapter, tiny_config: LlamaConfig
) -> None:
    tokens = random_tokens(tiny_config, 2, 19)
    expected = tiny_model(tokens, tiny_model.project(tiny_adapter))
    model = tiny_model.to(dtype)
    prompts = model.project(tiny_adapter)
    for layer in prompts.layers.values():
        assert (layer.k.dtype, layer.v.dtype, layer.gate.dtype) == (dtype, dtype, torch.float32)
    logits = model(tokens, prompts)
    assert logits.dtype == dtype
    assert (logits.float() - expected).norm() < 0.02 * expected.norm()
    loss_of(model, tiny_adapter, tokens).backward()
    for parameter in tiny_adapter.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert torch.all(torch.isfinite(parameter.grad))
        assert torch.count_nonzero(parameter.grad) > 0


@torch.no_grad()
def test_order_of_prompt_rows_does_not_matter(
    tiny_model: Llama, tiny_adapter: Adapter, tiny_config: LlamaConfig
) -> None:
    tokens = random_tokens(tiny_config, 2, 19)
    expected = tiny_model(tokens, tiny_model.project(tiny_adapter))
    tiny_adapter.prompts.copy_(tiny_adapter.prompts[:, [3, 0, 4, 2, 1]])
    got = tiny_model(tokens, tiny_model.project(tiny_adapter))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_bank_gives_every_sequence_its_own_adapter(
    tiny_model: Llama, tiny_adapter: Adapter, tiny_config: LlamaConfig
) -> None:
    other = Adapter(AdapterConfig(prompt_length=5), tiny_config)
    other.gates.normal_(std=1.5)
    first, second = tiny_model.project(tiny_adapter), tiny_model.project(other)
    bank = Prompts(
        {
            layer: LayerPrompt(
                torch.stack((first.layers[layer].k, second.layers[layer].k)),
                torch.stack((first.layers[layer].v, second.layers[layer].v)),
                torch.stack((first.layers[layer].gate, second.layers[layer].gate)),
            )
            for layer in first.layers
        },
        adapter_index=torch.tensor([1, -1, 0], dtype=torch.int32),
    )
    tokens = random_tokens(tiny_config, 3, 17)
    expected = [tiny_model(tokens[i : i + 1], p) for i, p in enumerate((second, None, first))]
    got = tiny_model(tokens, bank)
    torch.testing.assert_close(got, torch.cat(expected), rtol=0, atol=1e-5)
    assert (expected[0] - tiny_model(tokens[:1])).abs().max() > 0.1


@pytest.mark.parametrize(("side", "count"), [("input", 13_811_712), ("output", 14_917_632)])
def test_version_2_of_65b_is_the_papers_14_million(side: str, count: int) -> None:
    """Biases, scales and norms of the seven linear maps; its abstract says 14 M."""
    linears = tuple(name for name in LINEARS if name != "output")
    tuning = Tuning(("bias", "scale", "norm"), linears, side)
    with torch.device("meta"):
        adapter = Adapter(AdapterConfig(), PRESETS["llama-65b"], layers=(), tuning=tuning)
    assert sum(x.numel() for x in adapter.tuned_parameters().values()) == count
