"""The same base and adapter in litgpt, as its own fine-tuning has them.

Its weights are our tensors but for queries, keys and values, which it keeps as one, with the rows
of the first two in another order. Only imported where litgpt is installed.
"""

import importlib
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints.adapter_litgpt import to_halves
from llama_adapter.config import LlamaConfig
from llama_adapter.model import Llama

# by name: type checkers run where litgpt is not installed
litgpt = importlib.import_module("litgpt.adapter")


def _config(config: LlamaConfig, adapter: Adapter) -> Any:
    rope: dict[str, float] | None = None
    if config.rope_scaling is not None:
        rope = asdict(config.rope_scaling)
        rope["original_max_seq_len"] = rope.pop("original_context")
    return litgpt.Config(
        name="benchmark",
        block_size=config.max_seq_len,
        n_layer=config.n_layers,
        n_embd=config.dim,
        n_head=config.n_heads,
        n_query_groups=config.kv_heads,
        head_size=config.head_dim,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        norm_class_name="RMSNorm",
        norm_eps=config.norm_eps,
        parallel_residual=False,
        bias=False,
        rotary_percentage=1.0,
        rope_base=int(config.rope_theta),
        rope_adjustments=rope,
        mlp_class_name="LLaMAMLP",
        intermediate_size=config.hidden_dim,
        adapter_prompt_length=adapter.prompts.shape[1],
        adapter_start_layer=adapter.layers[0],
    )


def _state(model: Llama, adapter: Adapter) -> dict[str, Tensor]:
    """Our weights and a copy of the adapter by litgpt's names."""
    config, dtype = model.config, model.output_weight.dtype
    state = {
        "transformer.wte.weight": model.tok_embeddings.weight,
        "transformer.ln_f.weight": model.norm.weight,
        "lm_head.weight": model.output_weight,
    }
    for index, layer in enumerate(model.layers):
        own = {name.removesuffix(".weight"): value for name, value in layer.named_parameters()}
        q = to_halves(own["attention.wq"], config.n_heads)
        k = to_halves(own["attention.wk"], config.kv_heads)
        place = f"transformer.h.{index}"
        state |= {
            f"{place}.attn.qkv.weight": torch.cat([q, k, own["attention.wv"]]),
            f"{place}.attn.proj.weight": own["attention.wo"],
            f"{place}.mlp.fc_1.weight": own["feed_forward.w1"],
            f"{place}.mlp.fc_2.weight": own["feed_forward.w3"],
            f"{place}.mlp.proj.weight": own["feed_forward.w2"],
            f"{place}.norm_1.weight": own["attention_norm"],
            f"{place}.norm_2.weight": own["ffn_norm"],
        }
    for row, layer in enumerate(adapter.layers):
        place = f"transformer.h.{layer}.attn"
        gate = adapter.gates[row].detach().to(dtype).expand(config.n_heads)
        state[f"{place}.adapter_wte.weight"] = adapter.prompts[row].detach().to(dtype)
        state[f"{place}.gating_factor"] = gate.reshape(1, 1, -1, 1).clone()
    return state


class LitGPT(torch.nn.Module):
    """litgpt's model with its adapter, called as transformers' models are.

    Its attention keeps a prompt's keys and values of the first pass and takes them in every later
    one, through which no prompt would train; they are dropped before each pass here, so that its
    step is the right one.

    Attributes:
        model: litgpt's.
    """

    def __init__(self, base: Llama, adapter: Adapter) -> None:
        """Take over a model.

        Args:
            base: ours, not quantised.
            adapter: of all topmost layers, with gate_scope "layer" and the identity as activation.
        """
        super().__init__()
        with torch.device("meta"):
            model = litgpt.GPT(_config(base.config, adapter))
        model.load_state_dict(_state(base, adapter), assign=True)
        # tables of the rotary embedding, which are no weights
        model.cos, model.sin = model.rope_cache(device=base.output_weight.device)
        litgpt.mark_only_adapter_as_trainable(model)
        self.model, self.layers = model, adapter.layers

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, V) logits of tokens (B, T)."""
        for layer in self.layers:
            self._attention(layer).adapter_kv_cache = None
        return self.model(tokens)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Of prompts (L, P, C), and of gates (L, 1): a layer's is the sum of its heads'."""
        parts = [self._attention(layer) for layer in self.layers]
        prompts = torch.stack([part.adapter_wte.weight.grad for part in parts])
        return prompts, torch.stack([part.gating_factor.grad.sum().view(1) for part in parts])

    def _attention(self, layer: int) -> Any:
        return self.model.transformer.h[layer].attn
