"""Does a patched PEFT model compute what PEFT computes, and can it be given back?"""

import copy
import math
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import AdaptionPromptConfig, IA3Config, PeftModel, get_peft_model
from torch import Tensor, nn

from llama_adapter.hosts import adapt
from llama_adapter.hosts.attention import KEYWORD, NAME, Prompted
from llama_adapter.integrations import peft as integration
from llama_adapter.integrations.peft import patch, patched, unpatch
from tests.llama_adapter.hf_models import (
    SIZES,
    assert_same,
    generated,
    host,
    padding,
    peft_model,
    run,
    set_gates,
    tokens,
)

LLAMAS = ("llama", "mistral", "mistral window")
HEADS = {"grouped": {}, "full": {"num_key_value_heads": 8}, "one": {"num_key_value_heads": 1}}


@pytest.fixture
def model() -> PeftModel:
    """A small LLaMA with PEFT's prompts on three of four layers."""
    return peft_model(host())


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", LLAMAS)
def test_logits_and_gradients_are_pefts(kind: str, heads: str) -> None:
    model, ids = peft_model(host(kind, **HEADS[heads])), tokens()
    masks = (None, padding(), padding(left=False))
    theirs = [run(model, ids, mask) for mask in masks]
    patch(model)
    for mask, expected in zip(masks, theirs, strict=True):
        assert_same(run(model, ids, mask), expected)


@pytest.mark.parametrize("kind", LLAMAS)
def test_generated_tokens_are_pefts(kind: str) -> None:
    model, ids = peft_model(host(kind)), tokens()
    cases: list[dict[str, Any]] = [
        {},
        {"mask": padding()},
        {"use_cache": False, "mask": padding()},
        {"num_beams": 3},
    ]
    if kind != "mistral window":
        cases.append({"cache_implementation": "static", "mask": padding(), "disable_compile": True})
    theirs = [generated(model, ids, **case) for case in cases]
    patch(model)
    for case, expected in zip(cases, theirs, strict=True):
        assert torch.equal(generated(model, ids, **case), expected), case
    assert len({tuple(row.tolist()) for row in theirs[0][:, 11:]}) > 1


def test_cached_and_chunked_steps_are_the_whole(model: PeftModel) -> None:
    patch(model)
    ids = tokens()
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :4], use_cache=True)
        second = model(input_ids=ids[:, 4:9], past_key_values=first.past_key_values)
        third = model(input_ids=ids[:, 9:10], past_key_values=second.past_key_values)
    parts = torch.cat([first.logits, second.logits, third.logits], 1)
    torch.testing.assert_close(parts, whole[:, :10], rtol=0, atol=1e-5)


def test_projections_that_peft_repeats_run_once(model: PeftModel) -> None:
    counts: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(*_: object) -> None:
            counts[name] = counts.get(name, 0) + 1

        return hook

    attention = model.base_model.model.model.layers[3].self_attn.model
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(attention, name).register_forward_hook(count(name))
    with torch.no_grad():
        model(input_ids=tokens())
        theirs, counts = counts, {}
        patch(model)
        model(input_ids=tokens())
    assert theirs == {"q_proj": 2, "k_proj": 2, "v_proj": 3, "o_proj": 2}
    # keys and values of the tokens, and of the prompt
    assert counts == {"q_proj": 1, "k_proj": 2, "v_proj": 2, "o_proj": 1}


def test_report_names_what_was_patched(model: PeftModel) -> None:
    report = patch(model)
    assert len(report.modules) == 3
    assert report.modules[-1] == "base_model.model.model.layers.3.self_attn"
    assert (report.adapters, report.attention, report.biased) == (("default",), "sdpa", False)
    assert "3 attention modules of default" in str(report)
    again = patch(model)
    assert again == report
    stand_ins = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), Prompted)]
    assert len(stand_ins) == 3


def everything(model: nn.Module) -> dict[int, dict[str, object]]:
    """The attributes of every module, as they are now."""
    return {id(module): dict(module.__dict__) for module in model.modules()}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_unpatch_restores_the_model_exactly(implementation: str) -> None:
    model = peft_model(host(attn_implementation=implementation))
    before, names = everything(model), list(model.state_dict())
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
    with patched(model):
        assert model.config._attn_implementation == NAME
        assert list(model.state_dict()) == names
    assert everything(model) == before
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, expected)
    with pytest.raises(ValueError, match="model must be patched"):
        unpatch(model)


def test_context_manager_restores_after_an_error(model: PeftModel) -> None:
    def fail() -> None:
        with patched(model):
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail()
    assert model.config._attn_implementation == "sdpa"


def test_gradients_come_after_passes_without(model: PeftModel) -> None:
    ids = tokens()
    expected = run(model, ids)
    patch(model)
    with torch.no_grad():
        model(input_ids=ids)
    generated(model, ids)
    with torch.inference_mode():
        model(input_ids=ids)
    assert_same(run(model, ids), expected)


@torch.no_grad()
def change_by_step(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if "adaption" in name:
            parameter.add_(torch.full_like(parameter, 0.3))


def change_by_data(model: PeftModel) -> None:
    # what bumps no version counter
    for name, parameter in model.named_parameters():
        if "adaption" in name:
            parameter.data.mul_(-0.7)


def change_by_loading(model: PeftModel) -> None:
    model.load_state_dict({n: x * 0.8 for n, x in model.state_dict().items() if "adaption" in n},
                          strict=False)  # fmt: skip


def change_the_base(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if "k_proj" in name or "v_proj" in name:
            parameter.data.mul_(1.2)


@pytest.mark.parametrize(
    "change", [change_by_step, change_by_data, change_by_loading, change_the_base]
)
def test_no_projected_prompt_goes_stale(model: PeftModel, change: Any) -> None:
    ids, other = tokens(), copy.deepcopy(model)
    patch(model)
    generated(model, ids)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    for one in (model, other):
        change(one)
    with torch.no_grad():
        expected = other(input_ids=ids).logits
        got = model(input_ids=ids).logits
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert torch.equal(generated(model, ids), generated(other, ids))


def test_prompts_are_projected_once_per_generation(model: PeftModel) -> None:
    patch(model)
    calls: list[Tensor] = []
    attention = model.base_model.model.model.layers[3].self_attn.model
    attention.k_proj.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0]))
    generated(model, tokens())
    assert sum(x.ndim == 2 for x in calls) == 1
    generated(model, tokens())
    assert sum(x.ndim == 2 for x in calls) == 2
    attention = model.base_model.model.model.layers[3].self_attn
    assert attention.__dict__["forward"]._kept is None


def test_generation_with_gradients_forgets_what_it_kept(model: PeftModel) -> None:
    patch(model)
    stand_in = model.base_model.model.model.layers[3].self_attn.__dict__["forward"]
    stand_in.keep(True)
    prompt = stand_in.prompt(torch.zeros(1))
    assert prompt.k.requires_grad
    assert stand_in._kept is None


def test_several_adapters_switch_and_switch_off(model: PeftModel) -> None:
    settings = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    model.add_adapter("second", settings)
    model.set_adapter("second")
    set_gates(model, -1.3)
    names = ("default", "second", "default")

    def logits() -> list[Tensor]:
        found = []
        with torch.no_grad():
            for name in names:
                model.set_adapter(name)
                found.append(model(input_ids=tokens()).logits)
                with model.disable_adapter():
                    found.append(model(input_ids=tokens()).logits)
        return found

    theirs = logits()
    assert set(patch(model).adapters) == {"default", "second"}
    for ours, expected in zip(logits(), theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert (theirs[0] - theirs[2]).abs().max() > 0.1
    # switched off, the base itself
    assert torch.equal(theirs[1], theirs[3])
    unpatch(model)
    for ours, expected in zip(logits(), theirs, strict=True):
        assert torch.equal(ours, expected)


def test_an_adapter_added_later_runs_and_is_patched_by_the_next_call(model: PeftModel) -> None:
    patch(model)
    settings = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    model.add_adapter("later", settings)
    model.set_adapter("later")
    set_gates(model, 1.3)
    theirs = run(model, tokens())
    report = patch(model)
    assert report.adapters == ("default", "later")
    assert len(report.modules) == 2
    assert_same(run(model, tokens()), theirs)
    unpatch(model)
    assert_same(run(model, tokens()), theirs)


def test_a_bias_of_the_output_projection_is_added_once() -> None:
    model = peft_model(host(attention_bias=True))
    ids = tokens()
    with torch.no_grad():
        wrong = model(input_ids=ids).logits
    assert patch(model).biased
    patched_run = run(model, ids)
    unpatch(model)
    # PEFT's own code with the second bias taken off again
    for layer in model.base_model.model.model.layers[1:]:
        layer.self_attn.register_forward_hook(
            lambda module, _, out: (out[0] - module.model.o_proj.bias, *out[1:])
        )
    assert_same(patched_run, run(model, ids))
    assert (wrong - patched_run[0]).abs().max() > 0.1


def test_with_bias_and_zero_gates_the_base_is_unchanged() -> None:
    base = host(attention_bias=True)
    with torch.no_grad():
        expected = base(input_ids=tokens()).logits
    model = peft_model(base)
    set_gates(model, 0.0)
    patch(model)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens()).logits, expected, rtol=0, atol=1e-5)


def test_head_widths_that_peft_cannot_compute() -> None:
    model = peft_model(host(head_dim=16))
    with pytest.raises(RuntimeError), torch.no_grad():
        model(input_ids=tokens())
    patch(model)
    # the same model in which the heads are declared at their width: the literal formula
    layer = model.base_model.model.model.layers[3].self_attn
    hidden, angle = torch.randn(1, 4, 64), torch.randn(1, 4, 16)
    given = {
        "hidden_states": hidden,
        "position_embeddings": (angle.cos(), angle.sin()),
        "attention_mask": None,
    }
    inner = layer.model
    with torch.no_grad():
        got = layer(**given)[0]
        base = inner(**given)[0]
        q = inner.q_proj(hidden).view(1, 4, 8, 16).transpose(1, 2)
        turned = torch.cat([-q[..., 8:], q[..., :8]], -1)
        q = q * angle.cos()[:, None] + turned * angle.sin()[:, None]
        k, v = (
            project(layer.adaption_prompt).view(1, 5, 2, 16).transpose(1, 2).repeat_interleave(4, 1)
            for project in (inner.k_proj, inner.v_proj)
        )
        seen = (q @ k.mT / math.sqrt(16)).softmax(-1) @ v
        added = inner.o_proj((layer.adaption_gate * seen).transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, base + added, rtol=0, atol=1e-5)


def test_bfloat16_follows_peft_within_its_rounding(model: PeftModel) -> None:
    exact, _ = run(model, tokens(), padding())
    half = copy.deepcopy(model).to(torch.bfloat16)
    theirs, _ = run(half, tokens(), padding())
    patch(half)
    ours, grads = run(half, tokens(), padding())
    assert ours.dtype == torch.bfloat16
    assert all(grad.abs().max() > 0 for grad in grads.values())
    error, baseline = ((x.float() - exact).abs().max() for x in (ours, theirs))
    assert error <= 2 * baseline


def test_autocast_and_float32_prompts_on_a_bfloat16_base(model: PeftModel) -> None:
    exact, _ = run(model, tokens())
    patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours, grads = run(model, tokens())
    assert (ours.float() - exact).abs().max() < 0.3
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "adaption" in name:
            parameter.data = parameter.data.float()
    # PEFT itself cannot multiply these
    mixed, grads = run(model, tokens())
    assert (mixed.float() - exact).abs().max() < 0.3
    assert all(grad.dtype == torch.float32 for grad in grads.values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model: PeftModel, reentrant: bool) -> None:
    patch(model)
    expected = run(model, tokens(), padding())
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(run(model, tokens(), padding()), expected)


def test_dropout_of_probabilities_goes_to_transformers() -> None:
    model = peft_model(host(attention_dropout=0.5)).train()
    torch.manual_seed(5)
    theirs = run(model, tokens())
    patch(model)
    torch.manual_seed(5)
    assert_same(run(model, tokens()), theirs)


def test_packed_sequences_do_not_see_each_other(model: PeftModel) -> None:
    ids, positions = tokens(1, 11), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]])
    patch(model)
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = model(input_ids=ids[:, 4:]).logits
    torch.testing.assert_close(packed[:, 4:], alone, rtol=0, atol=1e-5)


def test_a_hole_in_the_mask(model: PeftModel) -> None:
    mask = padding()
    mask[2, 4:6] = 0
    theirs = run(model, tokens(), mask)
    patch(model)
    assert_same(run(model, tokens(), mask), theirs)


def test_trainer_takes_the_same_steps(model: PeftModel, tmp_path: Path) -> None:
    def train(one: PeftModel, name: str) -> list[float]:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=0.05,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            seed=5,
            save_strategy="no",
        )
        rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
        trainer = transformers.Trainer(model=one, args=arguments, train_dataset=rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    other = copy.deepcopy(model)
    patch(model)
    ours, theirs = train(model, "ours"), train(other, "theirs")
    assert len(ours) == 4
    assert ours[0] != ours[-1]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-4)


def test_files_are_pefts(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "theirs")
    patch(model)
    model.save_pretrained(tmp_path / "ours")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes()
             for name in ("ours", "theirs")]  # fmt: skip
    assert files[0] == files[1]
    loaded = PeftModel.from_pretrained(host(), tmp_path / "ours").eval()
    patch(loaded)
    with torch.no_grad():
        got, expected = (one(input_ids=tokens()).logits for one in (loaded, model))
    assert torch.equal(got, expected)


def test_a_saved_base_forgets_our_attention(model: PeftModel, tmp_path: Path) -> None:
    patch(model)
    model.base_model.model.config.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_a_copy_has_prompts_of_its_own(model: PeftModel) -> None:
    patch(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(input_ids=tokens()).logits
        set_gates(model, -0.4)
        torch.testing.assert_close(other(input_ids=tokens()).logits, expected, rtol=0, atol=0)
        assert (model(input_ids=tokens()).logits - expected).abs().max() > 0.1
    generated(other, tokens())


def test_switching_attention_under_the_patch_is_refused(model: PeftModel) -> None:
    patch(model)
    model.base_model.model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="must keep attn_implementation 'llama_adapter'"):
        model(input_ids=tokens())


def test_two_models_do_not_know_of_each_other(model: PeftModel) -> None:
    other = peft_model(host())
    patch(model)
    assert other.config._attn_implementation == "sdpa"
    assert not [m for m in other.modules() if "forward" in m.__dict__ and
                isinstance(m.__dict__["forward"], Prompted)]  # fmt: skip


def test_gpt2_is_refused_by_name() -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50)
    settings = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    model = get_peft_model(transformers.GPT2LMHeadModel(config), settings)
    before = everything(model)
    with pytest.raises(ValueError, match=r"llama or mistral, got gpt2 \(GPT2LMHeadModel\)"):
        patch(model)
    assert everything(model) == before


def test_models_without_adaption_prompts_are_refused() -> None:
    other = get_peft_model(host(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    for model in (host(), other):
        with pytest.raises(ValueError, match="must be a PEFT model with adaption prompts"):
            patch(model)


def test_odd_head_widths_are_refused() -> None:
    model = peft_model(host(head_dim=12))
    before = everything(model)
    with pytest.raises(ValueError, match="8 to 256 channels in steps of 8, got 12"):
        patch(model)
    assert everything(model) == before


def test_a_version_of_another_formula_is_refused(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.adaption_prompt.layer import AdaptedAttention

    theirs = AdaptedAttention.forward

    def with_tanh(self: Any, **kwargs: Any) -> Any:
        gate = self.adaption_gate.data.clone()
        self.adaption_gate.data.tanh_()
        try:
            return theirs(self, **kwargs)
        finally:
            self.adaption_gate.data.copy_(gate)

    monkeypatch.setattr(AdaptedAttention, "forward", with_tanh)
    integration._rehearse.cache_clear()
    before = everything(model)
    version = peft.__version__
    with pytest.raises(ValueError, match=f"peft {version} with transformers .* cannot be patched"):
        patch(model)
    assert everything(model) == before


def test_a_version_of_another_shape_is_refused(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = type(model.base_model.model.model.layers[3].self_attn.model)
    theirs = attention.forward

    def without_keywords(self: Any, **kwargs: Any) -> Any:
        kwargs.pop(KEYWORD, None)
        return theirs(self, **kwargs)

    monkeypatch.setattr(attention, "forward", without_keywords)
    integration._rehearse.cache_clear()
    before = everything(model)
    with pytest.raises(ValueError, match="cannot be patched, nothing was changed"):
        patch(model)
    assert everything(model) == before


def test_without_peft_the_remedy_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.tuners.adaption_prompt", None)
    with pytest.raises(ImportError, match="pip install") as caught:
        patch(nn.Linear(2, 2))
    assert "\n" not in str(caught.value)


def test_an_adapted_host_below_and_hooks_and_float64_are_refused_untouched() -> None:
    below = host()
    adapt(below, layers=2)
    hooked, wide = peft_model(host()), peft_model(host()).double()
    wrapper = next(m for m in hooked.modules() if hasattr(m, "adaption_gate"))
    wrapper.forward = wrapper.forward
    cases = (
        (peft_model(below), "must not run llama_adapter yet"),
        (hooked, "must have no hooks on its attention"),
        (wide, "must be float16, bfloat16 or float32, got torch.float64"),
    )
    for model, message in cases:
        before = model.config._attn_implementation
        with pytest.raises(ValueError, match=message):
            patch(model)
        assert model.config._attn_implementation == before
    assert wrapper.__dict__["forward"].__self__ is wrapper


def test_a_first_patch_under_autocast_is_no_other_version() -> None:
    integration._rehearse.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        patch(peft_model(host()))


def test_another_model_of_the_same_configuration_is_not_switched() -> None:
    config = transformers.LlamaConfig(**SIZES)
    first, second = (peft_model(transformers.LlamaForCausalLM(config)) for _ in range(2))
    patch(first)
    attention = second.base_model.model.model.layers[3].self_attn
    assert attention.model.config._attn_implementation == "sdpa"
    patch(second)
    unpatch(first)
    inner = first.base_model.model
    assert inner.config is inner.model.layers[3].self_attn.model.config is config
    with torch.no_grad():
        second(input_ids=tokens())
    unpatch(second)
    assert config._attn_implementation == "sdpa"
