"""One PEFT model three times over one set of weights, and what is timed of it and held to be right.

Only imported where transformers and peft are installed. `peft` is PEFT's own code, `patched` the
same model behind `patch`, `transformers` the base without an adapter.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from benchmarks.baselines import wider
from benchmarks.dropin_report import Setting
from benchmarks.generate_models import SETTINGS, Models
from benchmarks.generate_theirs import Theirs
from benchmarks.harness import Expected, expect
from benchmarks.roofline import DTYPES
from llama_adapter.adapter import Adapter
from llama_adapter.integrations.peft import patch

Call = Callable[[], dict[str, Tensor]]


class Problem:
    """A setting's models and inputs.

    Attributes:
        setting: what it is.
        models: transformers' causal model by provider.
    """

    def __init__(self, setting: Setting, device: torch.device) -> None:
        """Make the models.

        Args:
            setting: what they are.
            device: where.
        """
        self.setting, self.device, self.dtype = setting, device, DTYPES[setting.dtype]
        base = Models(setting.model, setting.dtype, device).base
        generator = torch.Generator().manual_seed(3)
        adapter = Adapter(SETTINGS, base.config, generator=generator)
        with torch.no_grad():
            adapter.gates.normal_(std=1.5, generator=generator)
        adapter = adapter.to(device)
        theirs, ours = Theirs(base, adapter), Theirs(base, adapter)
        patch(ours.wrapped)
        self.models: dict[str, Any] = {
            "patched": ours.adapted.model,
            "peft": theirs.adapted.model,
            "transformers": theirs.plain.model,
        }
        for model in self.models.values():
            _train_prompts(model)
        shape = (setting.batch, setting.tokens)
        self.ids = torch.randint(3, base.config.vocab_size, shape, generator=generator).to(device)
        wide = (*shape, base.config.dim)
        self.hidden = torch.randn(wide, generator=generator).to(device, self.dtype)

    def tokens_of(self, mode: str) -> int:
        """How many tokens a pass reads or writes."""
        new, read = self.setting.new, self.setting.tokens
        return self.setting.batch * (new if mode == "tokens" else read)

    def call(self, name: str, mode: str) -> Call:
        """What is timed of a provider."""
        return getattr(self, f"_{mode}")(self.models[name])

    def expected(self, mode: str) -> Mapping[str, Expected]:
        """PEFT's own results in a wider dtype, within a few times the error of its own code."""
        eager = getattr(self, f"_{mode}")(self.models["peft"])()
        wide = copy.deepcopy(self.models["peft"]).to(wider(self.dtype))
        # kept in float32, whatever the model's dtype
        wide.model.rotary_emb = LlamaRotaryEmbedding(wide.config).to(self.device)
        _train_prompts(wide)
        if mode == "tokens":
            with torch.no_grad():
                logits = wide(input_ids=self.ids, use_cache=False, logits_to_keep=1).logits
            return expect({"logits": logits[:, -1]}, eager)
        return expect(getattr(self, f"_{mode}")(wide)(), eager)

    def _block(self, model: Any) -> Call:
        attention, given = self._attention(model)

        @torch.no_grad()
        def call() -> dict[str, Tensor]:
            return {"out": attention(**given)[0]}

        return call

    def _block_training(self, model: Any) -> Call:
        attention, given = self._attention(model)
        leaves = {"dhidden": given["hidden_states"], **_prompts(attention)}

        def call() -> dict[str, Tensor]:
            out = attention(**given)[0]
            grads = torch.autograd.grad(out.square().mean(), list(leaves.values()))
            return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}

        return call

    def _attention(self, model: Any) -> tuple[Any, dict[str, Any]]:
        """The topmost layer's attention, and what the model would call it with."""
        dtype = model.lm_head.weight.dtype
        hidden = self.hidden.to(dtype)
        positions = torch.arange(self.setting.tokens, device=self.device)[None]
        angles = model.model.rotary_emb(hidden, positions)
        given = {"hidden_states": hidden.requires_grad_(), "attention_mask": None}
        return model.model.layers[-1].self_attn, {**given, "position_embeddings": angles}

    def _step(self, model: Any) -> Call:
        leaves = _prompts(model)

        def call() -> dict[str, Tensor]:
            out = model(input_ids=self.ids, labels=self.ids, use_cache=False)
            if not leaves:
                return {"loss": out.loss.detach()[None]}
            grads = torch.autograd.grad(out.loss, list(leaves.values()))
            found = list(zip(leaves, grads, strict=True))
            stacked = {
                f"d{kind}": torch.stack([grad for name, grad in found if kind in name])
                for kind in ("adaption_prompt", "adaption_gate")
            }
            return {"loss": out.loss.detach()[None], **stacked}

        return call

    def _tokens(self, model: Any) -> Call:
        new, shown = self.setting.new, torch.ones_like(self.ids)

        def call() -> dict[str, Tensor]:
            out = model.generate(
                input_ids=self.ids,
                attention_mask=shown,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            return {"logits": out.logits[0].float()}

        return call


def _prompts(module: Any) -> dict[str, Tensor]:
    return {name: x for name, x in module.named_parameters() if "adaption_" in name}


def _train_prompts(model: Any) -> None:
    for parameter in _prompts(model).values():
        parameter.requires_grad_()
