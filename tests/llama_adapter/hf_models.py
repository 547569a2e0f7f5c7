"""Small models of transformers for the tests of hosts and integrations."""

from typing import Any

import torch
import transformers
from peft import AdaptionPromptConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from llama_adapter.model import Llama

VOCABULARY = 199
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "mistral window": {"sliding_window": 5},
    "qwen2": {},
}


def host(kind: str = "llama", **changes: Any) -> Any:
    """A model of a kind with random weights, wide logits, every bias and norm of its own."""
    config = transformers.AutoConfig.for_model(kind.split()[0], **(SIZES | KINDS[kind] | changes))
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def peft_model(model: Any, adapter_len: int = 5, adapter_layers: int = 3) -> PeftModel:
    """The model with PEFT's adaption prompts, whose gates are not zero and reach beyond one."""
    settings = AdaptionPromptConfig(
        adapter_len=adapter_len, adapter_layers=adapter_layers, task_type="CAUSAL_LM"
    )
    torch.manual_seed(13)
    made = get_peft_model(model, settings)
    set_gates(made, 1.7)
    return made.eval()


@torch.no_grad()
def set_gates(model: nn.Module, first: float) -> None:
    """Gates first, -first / 2, first / 3 and so on."""
    gates = [x for name, x in model.named_parameters() if name.endswith("adaption_gate")]
    for n, gate in enumerate(gates, 1):
        gate.fill_(first / n * (-1) ** (n + 1))


def tokens(batch: int = 3, count: int = 11, seed: int = 3) -> Tensor:
    """Random tokens (B, T), none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, count), generator=generator)


def padding(batch: int = 3, count: int = 11, left: bool = True) -> Tensor:
    """(B, T), 4 and 2 tokens of padding in the first two rows."""
    mask = torch.ones(batch, count, dtype=torch.int64)
    mask[0, :4], mask[1, :2] = 0, 0
    return mask if left else mask.flip(-1)


def run(
    model: nn.Module, ids: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, zero where padded, and the gradient of the loss for everything trainable."""
    model.zero_grad()
    shown = torch.ones_like(ids) if mask is None else mask
    labels = ids.masked_fill(shown == 0, -100)
    out = model(input_ids=ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    trainable = {n: x.grad for n, x in model.named_parameters() if x.requires_grad}
    grads = {name: grad.clone() for name, grad in trainable.items() if grad is not None}
    assert grads
    return out.logits.detach() * shown[..., None], grads


def assert_same(
    ours: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]
) -> None:
    """Logits of several units and gradients that are not zero, equal to 1e-5."""
    assert theirs[0].std() > 0.5
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        assert grad.abs().max() > 1e-4, name
        torch.testing.assert_close(ours[1][name], grad, rtol=1e-4, atol=1e-5, msg=name)


def generated(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Eight greedy tokens after the prompt."""
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(input_ids=ids, attention_mask=mask, **settings, **options)


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of wq or wk as Hugging Face and litgpt order them: in a head all firsts of the pairs."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def state_of(model: Llama) -> dict[str, Tensor]:
    """The weights of a lean model by the names, and in the order of rows, of transformers."""
    state = {
        "model.embed_tokens.weight": model.tok_embeddings.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.output_weight,
    }
    for index, layer in enumerate(model.layers):
        attention, feed_forward = layer.attention, layer.feed_forward
        own = {
            "self_attn.q_proj": halves(attention.wq.weight, attention.n_heads),
            "self_attn.k_proj": halves(attention.wk.weight, attention.kv_heads),
            "self_attn.v_proj": attention.wv.weight,
            "self_attn.o_proj": attention.wo.weight,
            "mlp.gate_proj": feed_forward.w1.weight,
            "mlp.down_proj": feed_forward.w2.weight,
            "mlp.up_proj": feed_forward.w3.weight,
            "input_layernorm": layer.attention_norm.weight,
            "post_attention_layernorm": layer.ffn_norm.weight,
        }
        state |= {f"model.layers.{index}.{name}.weight": w for name, w in own.items()}
    return {name: value.detach().clone() for name, value in state.items()}


def on_transformers(model: Llama, **options: Any) -> transformers.LlamaForCausalLM:
    """The same weights in transformers' LLaMA; options are of its configuration."""
    config = model.config
    rope: dict[str, float | str] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_context,
        }
    given = {
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": config.max_seq_len,
        "rope_parameters": rope,
    }
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**given | options))
    theirs.load_state_dict(state_of(model))
    return theirs.eval()
