"""The same base in transformers, plain and wrapped by PEFT: what decodes LLaMA-Adapter elsewhere.

Every weight is the very tensor of our model but wq and wk, whose rows transformers wants in another
order. Only imported where both packages are installed. Generation is their forward call with their
cache in a loop, which is what their `generate` does without its work between two steps.
"""

from dataclasses import asdict
from typing import Any

import torch
import transformers
from peft import AdaptionPromptConfig, get_peft_model
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints.adapter_litgpt import to_halves
from llama_adapter.config import LlamaConfig
from llama_adapter.model import Llama


def _state(model: Llama) -> dict[str, Tensor]:
    """Our weights by transformers' names."""
    state = {
        "model.embed_tokens.weight": model.tok_embeddings.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.output_weight,
    }
    for index, layer in enumerate(model.layers):
        weights = {name.removesuffix(".weight"): value for name, value in layer.named_parameters()}
        own = {
            "self_attn.q_proj": to_halves(weights["attention.wq"], model.config.n_heads),
            "self_attn.k_proj": to_halves(weights["attention.wk"], model.config.kv_heads),
            "self_attn.v_proj": weights["attention.wv"],
            "self_attn.o_proj": weights["attention.wo"],
            "mlp.gate_proj": weights["feed_forward.w1"],
            "mlp.down_proj": weights["feed_forward.w2"],
            "mlp.up_proj": weights["feed_forward.w3"],
            "input_layernorm": weights["attention_norm"],
            "post_attention_layernorm": weights["ffn_norm"],
        }
        state |= {f"model.layers.{index}.{name}.weight": value for name, value in own.items()}
    return state


def _rope(config: LlamaConfig) -> dict[str, float | str]:
    rope: dict[str, float | str] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = asdict(config.rope_scaling)
        rope |= {"original_max_position_embeddings": scaling.pop("original_context"), **scaling}
        rope["rope_type"] = "llama3"
    return rope


def _causal_model(
    config: LlamaConfig, state: dict[str, Tensor], device: torch.device
) -> transformers.LlamaForCausalLM:
    """transformers' model around tensors that are there already."""
    theirs = transformers.LlamaConfig(
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied_embeddings,
        max_position_embeddings=config.max_seq_len,
        rope_parameters=_rope(config),
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(theirs)
    model.load_state_dict(state, assign=True)
    model.set_attn_implementation("sdpa")
    # its frequencies are no weights, and are still on the meta device
    model.model.rotary_emb = LlamaRotaryEmbedding(theirs).to(device)
    return model


class TheirModel:
    """One of transformers' models, decoded greedily in the shortest loop.

    Attributes:
        model: a causal model of transformers, of which PEFT may have wrapped the attention.
    """

    def __init__(self, model: Any) -> None:
        """Freeze a model."""
        self.model = model.requires_grad_(False).eval()

    @torch.inference_mode()
    def last_logits(self, tokens: Tensor) -> Tensor:
        """(B, V) logits behind tokens (B, T), without a cache."""
        return self.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]

    @torch.inference_mode()
    def begin(self, tokens: Tensor) -> tuple[DynamicCache, Tensor, Tensor]:
        """Read prompts (B, T): the cache, the next token (B, 1), the logits (B, V) it is from."""
        cache = DynamicCache(config=self.model.config)
        out = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = out.logits[:, -1]
        return cache, logits.argmax(-1, keepdim=True), logits

    @torch.inference_mode()
    def proceed(self, cache: DynamicCache, token: Tensor, steps: int) -> Tensor:
        """Continue: the tokens (B, 1 + steps), the given one first; waits for nothing."""
        tokens = [token]
        for _ in range(steps):
            out = self.model(input_ids=token, past_key_values=cache, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(token)
        return torch.cat(tokens, 1)


class Theirs:
    """A base in transformers, twice over one set of weights: plain, and wrapped by PEFT.

    Attributes:
        plain: the base.
        adapted: the base whose attention PEFT has wrapped.
        wrapped: PEFT's own wrapper around it.
    """

    def __init__(self, model: Llama, adapter: Adapter) -> None:
        """Take over a model.

        Args:
            model: ours, not quantised.
            adapter: of the layers and the prompt length of all that follow, with gate_scope "layer"
                and the identity as activation: PEFT's gate is a factor of a whole layer.
        """
        transformers.logging.set_verbosity_error()
        device = model.output_weight.device
        state = _state(model)
        self.plain = TheirModel(_causal_model(model.config, state, device))
        settings = AdaptionPromptConfig(
            adapter_layers=len(adapter.layers),
            adapter_len=adapter.prompts.shape[1],
            target_modules="self_attn",
            task_type="CAUSAL_LM",
        )
        wrapped = get_peft_model(_causal_model(model.config, state, device), settings)
        self.wrapped = wrapped
        # PEFT's own `generate` calls what is inside too
        self.adapted = TheirModel(wrapped.base_model.model)
        self.wear(adapter)

    def wear(self, adapter: Adapter) -> None:
        """Put an adapter's prompts and gates into the wrapped model."""
        for row, layer in enumerate(adapter.layers):
            attention = self.adapted.model.model.layers[layer].self_attn
            attention.adaption_prompt.copy_(adapter.prompts[row].detach()[None])
            attention.adaption_gate.copy_(adapter.gates[row].detach())
