"""One step trains what the batch names, exactly as one large batch would, and nothing else."""

import math
import random
import weakref
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints.quantize import quantize, round_to_float8
from llama_adapter.config import AdapterConfig, LlamaConfig
from llama_adapter.data.examples import IGNORE_INDEX, Batch, Example
from llama_adapter.data.packed import pack
from llama_adapter.model import Llama
from llama_adapter.trainer import Trainer
from tests.adapter_kernels.small_ops import Spy

BOTH = ("prompts", "gates")


def examples(count: int, seed: int = 0) -> tuple[Example, ...]:
    """Random examples of unequal lengths and unequal numbers of labels."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        tokens = [1, *(rng.randrange(3, 353) for _ in range(rng.randint(4, 23))), 2]
        masked = rng.randint(1, len(tokens) - 2)
        labels = (*[IGNORE_INDEX] * masked, *tokens[masked:])
        made.append(Example(index, tuple(tokens), labels))
    return tuple(made)


def snapshot(trainer: Trainer, group: str) -> dict[str, torch.Tensor]:
    """A group's parameters and optimiser state."""
    return {
        name: value.clone()
        for name, value in trainer.tensors().items()
        if name.split(".")[1] == group
    }


def test_the_loss_is_the_mean_over_the_labels_of_the_whole_batch(
    tiny_model: Llama, tiny_adapter: Adapter
) -> None:
    batch = examples(7)
    total, count = 0.0, 0
    with torch.no_grad():
        for example in batch:
            tokens = torch.tensor([example.tokens])
            logits = tiny_model(tokens, tiny_model.project(tiny_adapter))[0, :-1]
            labels = torch.tensor(example.labels[1:])
            total += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
            count += int((labels != -100).sum())
    trainer = Trainer(tiny_model, tiny_adapter, micro_batch_tokens=60)
    assert math.isclose(trainer.validate(batch), total / count, rel_tol=1e-6)
    loss, _ = trainer.step(Batch(batch, BOTH), 0.0)
    assert math.isclose(loss, total / count, rel_tol=1e-6)


def test_the_rows_that_carry_loss_are_not_searched_again(
    tiny_model: Llama, tiny_adapter: Adapter
) -> None:
    """Every row that reaches the loss has a label, and is told so: a GPU then waits for nothing."""
    with Spy() as spy:
        trainer = Trainer(tiny_model, tiny_adapter, micro_batch_tokens=10**6)
        trainer.step(Batch(examples(3), BOTH), 0.0)
    ((x, _, labels, ignore_index, _),) = (
        arguments for name, arguments, _ in spy.calls if name == "linear_cross_entropy"
    )
    carrying = [label for one in examples(3) for label in one.labels[1:] if label != IGNORE_INDEX]
    assert labels.tolist() == carrying
    assert len(x) == len(carrying)
    assert ignore_index is None


@pytest.mark.parametrize("most_tokens", [1, 30, 97])
def test_accumulated_micro_batches_equal_one_large_batch(
    tiny_model: Llama, tiny_adapter: Adapter, most_tokens: int
) -> None:
    results = []
    for size in (10**6, most_tokens):
        adapter = deepcopy(tiny_adapter)
        trainer = Trainer(tiny_model, adapter, micro_batch_tokens=size)
        loss, norm = trainer.step(Batch(examples(13), BOTH), 1e-3)
        results.append((loss, norm, adapter.prompts.grad, adapter.gates.grad))
    (loss, norm, *whole), (other_loss, other_norm, *parts) = results
    assert abs(loss - other_loss) <= 1e-6 * loss
    assert abs(norm - other_norm) <= 1e-6 * norm
    for a, b in zip(whole, parts, strict=True):
        assert a is not None
        assert b is not None
        assert float((a - b).abs().max()) <= 1e-6 * float(a.abs().max())


def test_the_gradient_is_that_of_the_mean_loss(tiny_model: Llama, tiny_adapter: Adapter) -> None:
    batch, other = examples(5), deepcopy(tiny_adapter)
    prompts, logits, labels = tiny_model.project(other), [], []
    for example in batch:
        logits.append(tiny_model(torch.tensor([example.tokens]), prompts)[0, :-1])
        labels += example.labels[1:]
    F.cross_entropy(torch.cat(logits), torch.tensor(labels)).backward()
    trainer = Trainer(tiny_model, tiny_adapter, micro_batch_tokens=40)
    _, norm = trainer.step(Batch(batch, BOTH), 0.0)
    squares = 0.0
    for group in BOTH:
        expected = getattr(other, group).grad
        torch.testing.assert_close(
            getattr(tiny_adapter, group).grad, expected, rtol=1e-4, atol=1e-6
        )
        squares += float(expected.double().square().sum())
    assert math.isclose(norm, math.sqrt(squares), rel_tol=1e-5)


def test_weight_decay_pulls_prompts_and_gates_alike(
    tiny_model: Llama, tiny_adapter: Adapter
) -> None:
    lr, decay, after = 0.05, 0.3, {}
    for weight_decay in (0.0, decay):
        adapter = deepcopy(tiny_adapter)
        trainer = Trainer(tiny_model, adapter, micro_batch_tokens=80, weight_decay=weight_decay)
        trainer.step(Batch(examples(4), BOTH), lr)
        after[weight_decay] = adapter
    for group in BOTH:
        before = getattr(tiny_adapter, group)
        pulled = getattr(after[decay], group) - getattr(after[0.0], group)
        torch.testing.assert_close(pulled, -lr * decay * before, rtol=1e-4, atol=1e-6)


def test_prompts_and_gates_stay_float32_on_a_bfloat16_base(
    tiny_model: Llama, tiny_adapter: Adapter
) -> None:
    trainer = Trainer(tiny_model.bfloat16(), tiny_adapter, micro_batch_tokens=40)
    before = deepcopy(tiny_adapter)
    for _ in range(2):
        loss, norm = trainer.step(Batch(examples(4), BOTH), 1e-5)
        assert math.isfinite(loss)
        assert norm > 0
    for group in BOTH:
        moved = (getattr(tiny_adapter, group) - getattr(before, group)).detach()
        # a step this small is lost in bfloat16
        assert 0 < float(moved.abs().max()) < 1e-4
    tensors = trainer.tensors()
    states = [v for name, v in tensors.items() if name.startswith(("adapter.", "optimiser."))]
    assert len(states) == 2 + 2 * 3
    assert {value.dtype for value in states} == {torch.float32}


def test_a_half_precision_adapter_is_refused(tiny_model: Llama, tiny_adapter: Adapter) -> None:
    with pytest.raises(ValueError, match=r"adapter must be float32, prompts is torch\.bfloat16"):
        Trainer(tiny_model, tiny_adapter.bfloat16(), micro_batch_tokens=40)


def test_the_base_gets_no_gradient_and_keeps_every_bit(
    tiny_model: Llama, tiny_adapter: Adapter
) -> None:
    before = {name: value.clone() for name, value in tiny_model.named_parameters()}
    trainer = Trainer(tiny_model, tiny_adapter, micro_batch_tokens=40)
    for seed in range(3):
        trainer.step(Batch(examples(5, seed), BOTH), 0.1)
    for name, value in tiny_model.named_parameters():
        assert value.grad is None
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(("name", "limit"), [("int8", 1e-4), ("nf4", 1e-5)])
def test_a_quantised_base_gives_the_gradients_of_its_rounded_weights(
    name: str, limit: float, even_model: Llama, tiny_adapter: Adapter
) -> None:
    pytest.importorskip("torchao.quantization")
    rounded, other, batch = deepcopy(even_model), deepcopy(tiny_adapter), Batch(examples(7), BOTH)
    quantize(even_model, name)
    with torch.no_grad():
        for plain, packed in zip(rounded.parameters(), even_model.parameters(), strict=True):
            whole = {"int8": "dequantize", "nf4": "get_original_weight"}[name]
            changed = type(packed).__module__.startswith("torchao")
            plain.copy_(getattr(packed, whole)() if changed else packed)
    losses = [
        Trainer(model, adapter, micro_batch_tokens=60).step(batch, 0.0)[0]
        for model, adapter in ((even_model, tiny_adapter), (rounded, other))
    ]
    assert math.isclose(losses[0], losses[1], rel_tol=1e-5)
    for group in BOTH:
        got, expected = (getattr(adapter, group).grad for adapter in (tiny_adapter, other))
        assert float(expected.abs().max()) > 1e-4
        assert float((got - expected).abs().max()) <= limit * float(expected.abs().max())


@pytest.mark.parametrize("name", ["nf4", "fp8"])
def test_training_on_coarse_weights_gains_as_much(
    name: str, even_model: Llama, tiny_adapter: Adapter
) -> None:
    packed, gains = deepcopy(even_model), []
    if name == "nf4":
        pytest.importorskip("torchao.quantization")
        quantize(packed, name)
    else:
        round_to_float8(packed)
    for model in (even_model, packed):
        trainer = Trainer(model, deepcopy(tiny_adapter), micro_batch_tokens=60)
        losses = [trainer.step(Batch(examples(7), BOTH), 0.05)[0] for _ in range(12)]
        gains.append(losses[0] - losses[-1])
    assert gains[0] > 0.3
    assert gains[1] > 0.8 * gains[0]


def test_a_base_whose_products_have_no_gradient_is_refused(
    tiny_model: Llama, tiny_adapter: Adapter
) -> None:
    packed = type("Int4Tensor", (torch.nn.Parameter,), {"__module__": "torchao.quantization"})
    weight = tiny_model.layers[0].attention.wq.weight.detach()
    tiny_model.layers[0].attention.wq.weight = packed(weight, requires_grad=False)
    with pytest.raises(
        ValueError, match="model must be as it is, in int8, nf4 or fp8 to train on it"
    ):
        Trainer(tiny_model, tiny_adapter, micro_batch_tokens=20)


def test_a_base_that_is_not_frozen_is_refused(tiny_model: Llama, tiny_adapter: Adapter) -> None:
    tiny_model.layers[2].requires_grad_(True)
    with pytest.raises(ValueError, match=r"model must be frozen, layers\.2\.attention\.wq\.weight"):
        Trainer(tiny_model, tiny_adapter, micro_batch_tokens=40)


def test_at_step_zero_gates_have_a_gradient_and_prompts_have_exactly_none(
    tiny_model: Llama, tiny_config: LlamaConfig
) -> None:
    adapter = Adapter(AdapterConfig(prompt_length=3), tiny_config)
    Trainer(tiny_model, adapter, micro_batch_tokens=60).step(Batch(examples(3), BOTH), 0.0)
    assert adapter.gates.grad is not None
    assert adapter.prompts.grad is not None
    assert float(adapter.gates.grad.abs().min()) > 0
    assert float(adapter.prompts.grad.abs().max()) == 0


@pytest.mark.parametrize("trained", BOTH)
def test_a_group_that_the_batch_does_not_name_is_left_alone(
    tiny_model: Llama, tiny_adapter: Adapter, trained: str
) -> None:
    other = BOTH[1 - BOTH.index(trained)]
    trainer = Trainer(tiny_model, tiny_adapter, micro_batch_tokens=40, weight_decay=0.5)
    trainer.step(Batch(examples(4), BOTH), 0.1)
    untouched, touched = snapshot(trainer, other), snapshot(trainer, trained)
    # parameter, step count and two moments
    assert len(untouched) == 4
    for seed in range(3):
        trainer.step(Batch(examples(4, seed), (trained,)), 0.1)
    for name, value in snapshot(trainer, other).items():
        assert torch.equal(value, untouched[name]), name
    for name, value in snapshot(trainer, trained).items():
        assert not torch.equal(value, touched[name]), name
    assert getattr(tiny_adapter, other).grad is None
    trainer.step(Batch(examples(4), BOTH), 0.1)
    assert not torch.equal(snapshot(trainer, other)[f"adapter.{other}"], untouched[
        f"adapter.{other}"
    ])  # fmt: skip


@pytest.mark.parametrize("groups", [(), ("prompts", "bias")])
def test_a_batch_must_name_groups_that_exist(
    tiny_model: Llama, tiny_adapter: Adapter, groups: tuple[str, ...]
) -> None:
    trainer = Trainer(tiny_model, tiny_adapter, micro_batch_tokens=40)
    with pytest.raises(ValueError, match=r"must name some of \('prompts', 'gates'\), got \("):
        trainer.step(Batch(examples(2), groups), 0.1)


def test_a_batch_without_any_label_has_a_finite_loss(
    tiny_model: Llama, tiny_adapter: Adapter
) -> None:
    bare = tuple(Example(e.index, e.tokens, (IGNORE_INDEX,) * len(e.tokens)) for e in examples(3))
    trainer = Trainer(tiny_model, tiny_adapter, micro_batch_tokens=40)
    assert trainer.step(Batch(bare, BOTH), 0.1) == (0.0, 0.0)
    assert bool(tiny_adapter.prompts.isfinite().all())
    assert bool(tiny_adapter.gates.isfinite().all())


def test_a_loss_that_is_not_finite_names_the_records_and_changes_nothing(
    tiny_model: Llama, tiny_adapter: Adapter
) -> None:
    good = examples(6)
    bad = Example(41, (1, 7, 350, 9, 2), (-100, -100, 350, 9, 2))
    with torch.no_grad():
        tiny_model.tok_embeddings.weight[350] = math.nan
    clean = tuple(e for e in good if 350 not in e.tokens)
    trainer = Trainer(tiny_model, tiny_adapter, micro_batch_tokens=20)
    trainer.step(Batch(clean, BOTH), 0.1)
    before = {name: value.clone() for name, value in trainer.tensors().items()}
    with pytest.raises(
        FloatingPointError, match=r"^the loss is nan in records 41 \(numbered from 0\)$"
    ):
        trainer.step(Batch((*clean, bad), BOTH), 0.1)
    for name, value in trainer.tensors().items():
        assert torch.equal(value, before[name]), name


def test_a_gradient_that_is_not_finite_is_an_error(
    tiny_model: Llama, tiny_adapter: Adapter
) -> None:
    trainer = Trainer(tiny_model, tiny_adapter, micro_batch_tokens=80)
    tiny_adapter.gates.register_hook(lambda gradient: gradient * math.inf)
    message = "the gradient is not finite in records 0, 1, 2, 3, 4, 5, 6, 7 and 3 more \\(numbered"
    with pytest.raises(FloatingPointError, match=message):
        trainer.step(Batch(examples(11), BOTH), 0.1)


def test_clipping_limits_the_norm_over_all_trained_groups(
    tiny_model: Llama, tiny_adapter: Adapter
) -> None:
    free = Trainer(tiny_model, deepcopy(tiny_adapter), micro_batch_tokens=80)
    _, norm = free.step(Batch(examples(4), BOTH), 0.0)
    clipped = Trainer(tiny_model, tiny_adapter, micro_batch_tokens=80, clip=norm / 3)
    _, reported = clipped.step(Batch(examples(4), BOTH), 0.0)
    assert reported == norm
    gradients = [getattr(tiny_adapter, group).grad for group in BOTH]
    left = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    assert math.isclose(left, norm / 3, rel_tol=1e-4)


def test_a_restored_trainer_continues_bitwise(tiny_model: Llama, tiny_adapter: Adapter) -> None:
    trainer = Trainer(tiny_model, tiny_adapter, micro_batch_tokens=60)
    for seed in range(4):
        trainer.step(Batch(examples(5, seed), BOTH if seed % 2 else ("gates",)), 0.02)
    held = {name: value.clone() for name, value in trainer.tensors().items()}
    other = Trainer(tiny_model, deepcopy(tiny_adapter), micro_batch_tokens=60)
    other.load_tensors(held)
    for seed in range(4, 7):
        batch = Batch(examples(5, seed), BOTH)
        assert trainer.step(batch, 0.02) == other.step(batch, 0.02)
    for name, value in trainer.tensors().items():
        assert torch.equal(value, other.tensors()[name]), name


def test_random_states_are_restored(tiny_model: Llama, tiny_adapter: Adapter) -> None:
    trainer = Trainer(tiny_model, tiny_adapter, micro_batch_tokens=60)
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        held = trainer.tensors()
        drawn = torch.rand(3)
        torch.manual_seed(6)
        trainer.load_tensors(held)
        assert torch.equal(torch.rand(3), drawn)


def middle_sized(recompute: str | None) -> Trainer:
    """Of 6 layers, the upper 4 of which are adapted; any batch is one pass."""
    config = LlamaConfig(dim=64, n_layers=6, n_heads=4, vocab_size=353, multiple_of=16)
    model = Llama(config).requires_grad_(False)
    adapter = Adapter(AdapterConfig(prompt_length=3, n_layers=4), config)
    return Trainer(model, adapter, micro_batch_tokens=10**6, recompute=recompute)


@pytest.mark.parametrize(
    ("recompute", "widths", "hidden_widths"), [(None, 6, 2), ("mlp", 6, 0), ("block", 1, 0)]
)
def test_a_step_keeps_what_the_formulas_need_and_nothing_below_the_adapter(
    recompute: str | None, widths: int, hidden_widths: int
) -> None:
    """Per token and adapted layer q, k, v and the tokens' own output, two norms' inputs, gate and
    up: 6 C + 2 F numbers, 2.8 MB a token at 7B in bfloat16. Computing gate and up again leaves
    what attention gave in place of the second norm's input, 6 C; a whole layer, its input."""
    trainer = middle_sized(recompute)
    model, adapter, config = trainer.model, trainer.adapter, trainer.model.config
    known = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *adapter.parameters())}
    saved: list[weakref.ref[torch.Tensor]] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        # the graph alone holds what is handed back
        x = x.view(x.shape)
        saved.append(weakref.ref(x))
        return x

    batch = pack(examples(13))
    known.add(batch.tokens.untyped_storage().data_ptr())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = trainer.hidden(batch)
    storages = [x.untyped_storage() for x in (ref() for ref in saved) if x is not None]
    kept = {x.data_ptr(): x.nbytes() for x in storages if x.data_ptr() not in known}
    assert hidden.requires_grad
    numbers = sum(kept.values()) / 4
    tokens, each = len(batch.tokens), widths * config.dim + hidden_widths * config.hidden_dim
    # the last norm keeps its input, and the lowest layer not its own, unless it computes again
    most = 4 * each + (0 if recompute is None else config.dim)
    # angles, statistics of rows and the prompts are little
    assert numbers <= 1.03 * tokens * most
    assert numbers >= tokens * 3 * each, "the test sees what is kept"


def test_gate_and_up_are_two_products_more() -> None:
    """And the product after them is not computed again."""
    batch, counts = pack(examples(13)), {}
    for recompute in (None, "mlp", "block"):
        trainer = middle_sized(recompute)
        with FlopCounterMode(display=False) as counter:
            trainer.hidden(batch).sum().backward()
        counts[recompute] = counter.get_total_flops()
    config, tokens = trainer.model.config, len(batch.tokens)
    attention = 4 * config.dim**2
    mlp = 2 * config.dim * config.hidden_dim
    assert counts["mlp"] - counts[None] == 2 * tokens * 4 * mlp
    assert counts["block"] - counts[None] == 2 * tokens * 4 * (attention + mlp)


@pytest.mark.parametrize("name", [None, "int8", "nf4", "fp8"])
def test_computing_again_gives_the_same_gradients(
    name: str | None, even_model: Llama, tiny_adapter: Adapter
) -> None:
    """Of packed records that share their beginning, on whatever base."""
    if name == "fp8":
        round_to_float8(even_model)
    elif name is not None:
        pytest.importorskip("torchao.quantization")
        quantize(even_model, name)
    start = (1, 7, 9, 20, 4)
    batch = [
        replace(e, tokens=start + e.tokens, labels=(IGNORE_INDEX,) * 5 + e.labels)
        for e in examples(9)
    ]
    found = []
    for recompute in (None, "mlp", "block"):
        adapter = deepcopy(tiny_adapter)
        trainer = Trainer(
            even_model, adapter, micro_batch_tokens=90, prefixes=[start], recompute=recompute
        )
        loss, norm = trainer.step(Batch(tuple(batch), BOTH), 0.0)
        gradients = [getattr(adapter, group).grad for group in BOTH]
        found.append((loss, norm, trainer.validate(batch), gradients))
    assert found[0][1] > 1e-3
    for other in found[1:]:
        assert other[:3] == found[0][:3]
        assert all(map(torch.equal, other[3], found[0][3]))


def test_an_unknown_part_is_refused(tiny_model: Llama, tiny_adapter: Adapter) -> None:
    with pytest.raises(ValueError, match=r"one of \('mlp', 'block'\) or None, got 'attention'"):
        Trainer(tiny_model, tiny_adapter, micro_batch_tokens=40, recompute="attention")
