"""Training of biases, scales, norms and LoRA: exact gradients, undecayed vectors, whole runs."""

import json
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints import Base
from llama_adapter.checkpoints.adapter_file import load_adapter, read_header
from llama_adapter.checkpoints.quantize import quantize, round_to_float8
from llama_adapter.cli import main
from llama_adapter.config import AdapterConfig, LlamaConfig
from llama_adapter.data.examples import IGNORE_INDEX, Batch
from llama_adapter.model import Llama
from llama_adapter.recipe import FinetuneConfig
from llama_adapter.tokenizer import Tokenizer
from llama_adapter.trainer import Trainer
from llama_adapter.training import finetune
from llama_adapter.tuned_modules import copy_norms
from llama_adapter.tuning import GROUPS, LAYER_LINEARS, Lora, Tuning, TuningOptions
from tests.llama_adapter.plain_llama import PlainLlama, precise
from tests.llama_adapter.test_trainer import examples
from tests.llama_adapter.test_training import write_data
from tests.llama_adapter.test_tuned_modules import EVERYTHING, tuned_adapter

SEVEN = Tuning(GROUPS, LAYER_LINEARS, "input", Lora(3))
ALL = ("prompts", "gates", *GROUPS)


def plain_gradients(
    model: Llama, adapter: Adapter, batch: Batch
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by autograd of the dense formula in float64, an example at a time."""
    values = precise(adapter)
    plain = PlainLlama(model, adapter, values)
    total, count = torch.zeros(()).double(), 0
    for example in batch.examples:
        labels = torch.tensor(example.labels[1:])
        logits = plain.logits(torch.tensor(example.tokens))[:-1]
        total = total + F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
        count += example.n_labels
    (total / count).backward()
    found = {name: value.grad for name, value in values.items() if value.grad is not None}
    return float(total) / count, found


def assert_gradients(adapter: Adapter, expected: dict[str, Tensor], limit: float = 2e-5) -> None:
    for name, parameter in adapter.named_parameters():
        largest = float(expected[name].abs().max())
        assert parameter.grad is not None, name
        assert largest > 1e-6, name
        error = float((parameter.grad.double() - expected[name]).abs().max())
        assert error <= limit * largest, (name, error, largest)


@pytest.mark.parametrize("recompute", [None, "mlp", "block"])
@pytest.mark.parametrize(
    "tuning",
    [SEVEN, EVERYTHING, replace(EVERYTHING, lora=Lora(2, ("wk", "wv"), prompts=True))],
    ids=["input side", "with the logits", "prompts too"],
)
def test_gradients_are_those_of_the_formula(
    tuning: Tuning, recompute: str | None, tiny_model: Llama, tiny_config: LlamaConfig
) -> None:
    adapter, batch = tuned_adapter(tiny_config, tuning), Batch(examples(7), ALL)
    loss, expected = plain_gradients(tiny_model, adapter, batch)
    trainer = Trainer(tiny_model, adapter, micro_batch_tokens=60, recompute=recompute)
    assert math.isclose(trainer.validate(batch.examples), loss, rel_tol=1e-5)
    got, norm = trainer.step(batch, 0.0)
    assert math.isclose(got, loss, rel_tol=1e-5)
    square = sum(float(x.square().sum()) for x in expected.values())
    assert math.isclose(norm, square**0.5, rel_tol=1e-4)
    assert_gradients(adapter, expected)
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_shared_beginnings_change_no_gradient(tiny_model: Llama, tiny_config: LlamaConfig) -> None:
    adapter, begin = tuned_adapter(tiny_config, SEVEN), (1, 5, 9, 40, 7)
    several = tuple(
        replace(
            one, tokens=(*begin, *one.tokens[1:]), labels=(*[IGNORE_INDEX] * 5, *one.labels[1:])
        )
        for one in examples(5)
    )
    batch = Batch(several, ALL)
    _, expected = plain_gradients(tiny_model, adapter, batch)
    Trainer(tiny_model, adapter, micro_batch_tokens=999, prefixes=(begin,)).step(batch, 0.0)
    assert_gradients(adapter, expected)


@pytest.mark.parametrize("name", ["int8", "nf4", "fp8"])
def test_a_quantised_base_gives_the_gradients_of_its_rounded_weights(
    name: str, even_model: Llama
) -> None:
    """To what the products' own rounding is: fp8 also rounds what it multiplies."""
    adapter, batch = tuned_adapter(even_model.config, EVERYTHING), Batch(examples(5), ALL)
    original = even_model.layers[0].attention.wq.weight.clone()
    rounded = deepcopy(even_model)
    if name == "fp8":
        round_to_float8(even_model)
    else:
        pytest.importorskip("torchao.quantization")
        quantize(even_model, name)
    with torch.no_grad():
        for plain, packed in zip(rounded.parameters(), even_model.parameters(), strict=True):
            whole = "get_original_weight" if name == "nf4" else "dequantize"
            changed = hasattr(packed, "scale" if name == "fp8" else whole)
            changed = changed and type(packed) is not torch.nn.Parameter
            plain.copy_(getattr(packed, whole)() if changed else packed)
    assert not torch.equal(rounded.layers[0].attention.wq.weight, original)
    loss, expected = plain_gradients(rounded, adapter, batch)
    got, _ = Trainer(even_model, adapter, micro_batch_tokens=60).step(batch, 0.0)
    coarse = name == "fp8"
    assert math.isclose(got, loss, rel_tol=0.05 if coarse else 1e-4)
    if coarse:
        for key, parameter in adapter.named_parameters():
            assert parameter.grad is not None
            cosine = F.cosine_similarity(
                parameter.grad.double().flatten(), expected[key].flatten(), 0
            )
            assert cosine > 0.9, (key, float(cosine))
    else:
        assert_gradients(adapter, expected, 1e-3)


def test_a_half_precision_base_trains_float32_groups(
    tiny_model: Llama, tiny_config: LlamaConfig
) -> None:
    adapter, batch = tuned_adapter(tiny_config, EVERYTHING), Batch(examples(7), ALL)
    tiny_model.bfloat16()
    trainer = Trainer(tiny_model, adapter, micro_batch_tokens=60)
    losses = [trainer.step(batch, 0.003)[0] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.2
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}


def test_vectors_are_not_decayed_and_matrices_are(
    tiny_model: Llama, tiny_config: LlamaConfig
) -> None:
    """With gradients of zero AdamW does nothing but decay: by 1 - 0.1 * 0.5."""
    adapter = tuned_adapter(tiny_config, EVERYTHING)
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    trainer = Trainer(tiny_model, adapter, micro_batch_tokens=60, weight_decay=0.5)
    for optimiser in trainer.optimisers.values():
        for options in optimiser.param_groups:
            options["lr"] = 0.1
            for parameter in options["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
    for name, value in adapter.state_dict().items():
        decayed = name in ("prompts", "gates") or name.startswith("lora_")
        torch.testing.assert_close(value, before[name] * (0.95 if decayed else 1.0))


def test_a_group_that_is_not_named_keeps_every_bit(
    tiny_model: Llama, tiny_config: LlamaConfig
) -> None:
    adapter = tuned_adapter(tiny_config, EVERYTHING)
    trainer = Trainer(tiny_model, adapter, micro_batch_tokens=60)
    trainer.step(Batch(examples(3), ALL), 0.01)
    for group in ALL:
        before = {name: value.clone() for name, value in trainer.tensors().items()}
        trainer.step(Batch(examples(3, seed=1), (group,)), 0.01)
        own = {id(p) for p in trainer.groups[group]}
        for name, parameter in adapter.named_parameters():
            same = torch.equal(before[f"adapter.{name}"], parameter)
            assert same == (id(parameter) not in own), (group, name)
        for name, value in trainer.tensors().items():
            if name.startswith("optimiser."):
                assert torch.equal(before[name], value) == (name.split(".")[1] != group), name


def test_a_sharded_base_is_refused(
    tiny_model: Llama, tiny_config: LlamaConfig, tmp_path: Path
) -> None:
    kind = type("FSDPModule", (), {})
    tiny_model.__class__ = type("Llama", (Llama, kind), {})
    with pytest.raises(ValueError, match="prompts and gates alone on a sharded base, got bias, sc"):
        Trainer(tiny_model, tuned_adapter(tiny_config), micro_batch_tokens=60)
    with pytest.raises(ValueError, match=r"tune must be left out with shard, got \('norm',\)"):
        FinetuneConfig(tmp_path, tmp_path, shard=True, tuning=TuningOptions(("norm",)))


@pytest.fixture
def base(tiny_model: Llama, tiny_tokenizer: Tokenizer) -> Base:
    return Base(tiny_model, tiny_tokenizer, "tiny", None)


def run_of(folder: Path, **changes: object) -> FinetuneConfig:
    data = write_data(folder / "data.json", 24)
    config = FinetuneConfig(
        data,
        folder / "run",
        val_size=4,
        batch_size=8,
        epochs=2,
        lr=3e-3,
        save_every=2,
        adapter=AdapterConfig(prompt_length=3, n_layers=2),
        tuning=TuningOptions(("bias", "scale", "norm", "lora"), lora_rank=2),
    )
    return replace(config, **changes)  # pyright: ignore[reportArgumentType]


def test_a_run_begins_as_the_base_learns_and_is_read_back(base: Base, tmp_path: Path) -> None:
    plain = finetune(run_of(tmp_path, output=tmp_path / "plain", tuning=TuningOptions()), base=base)
    result = finetune(run_of(tmp_path), base=base)
    # at step 0 nothing has changed, with the base's own norms
    assert math.isclose(result.losses[0], plain.losses[0], rel_tol=1e-6)
    assert result.losses[-1] < plain.losses[-1] - 0.1
    header = read_header(result.adapter_path)
    assert header.groups == ("prompts", "gates", *GROUPS)
    assert (header.scale_side, header.linears) == ("output", LAYER_LINEARS)
    assert header.lora == Lora(2)
    loaded = load_adapter(result.adapter_path, base.model, "tiny")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = base.model(ids, base.model.project(result.adapter))
        assert torch.equal(base.model(ids, base.model.project(loaded)), expected)
    trained = result.adapter.tuned_parameters()
    fresh = Adapter(AdapterConfig(), base.model.config, tuning=loaded.tuning).tuned_parameters()
    copy_norms(base.model, fresh)
    for name, value in trained.items():
        assert not torch.equal(value, fresh[name]), name


def test_a_continued_run_is_the_same_run(base: Base, tmp_path: Path) -> None:
    whole = finetune(run_of(tmp_path), base=base)
    part = run_of(tmp_path, output=tmp_path / "part", max_steps=3)
    finetune(part, base=base)
    resumed = finetune(replace(part, max_steps=None), base=base, resume=True)
    assert resumed.losses == whole.losses
    state = whole.adapter.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in resumed.adapter.state_dict().items())
    other = replace(part, tuning=TuningOptions(("bias",)))
    with pytest.raises(ValueError, match=r"cannot resume .*: tuning\.tune was \['bias', 'scale'"):
        finetune(other, base=base, resume=True)


def test_the_command_line_tunes_the_bundled_base_and_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = write_data(tmp_path / "data.json", 16), tmp_path / "run"
    words = ["finetune", "--data", str(data), "--output", str(run), "--max-steps", "2", "--quiet"]
    tuned = ["--tune", "norm", "scale", "bias", "--scale-side", "input"]
    assert main([*words, *tuned, "--tune", "lora", "bias", "--scale-side", "input"]) == 2
    assert "scale_side must be left out without tune scale" in capsys.readouterr().err
    assert main([*words, *tuned]) == 0
    held = json.loads((run / "config.json").read_text())
    assert held["tuning"] == {
        "tune": ["norm", "scale", "bias"], "scale_side": "input", "lora_rank": None
    }  # fmt: skip
    assert main(["info", str(run / "adapter.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "groups      prompts, gates, bias, scale, norm" in out
    assert "linear maps wq, wk, wv, wo, w1, w2, w3; scale on the input side" in out
    asked = ["generate", "List two birds.", "--adapter", str(run / "adapter.safetensors")]
    assert main([*asked, "--max-new-tokens", "3", "--temperature", "0"]) == 0
    assert main([*words, "--resume"]) == 0


def test_lora_is_told_by_info(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = finetune(run_of(tmp_path, max_steps=1), base=base)
    assert main(["info", str(result.adapter_path)]) == 0
    said = "lora        rank 2 of wq, wk, wv, wo, w1, w2, w3, for tokens alone"
    assert said in capsys.readouterr().out
