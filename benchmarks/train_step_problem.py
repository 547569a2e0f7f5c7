"""What a training step is given, and the ways to take it: records of Alpaca's lengths, one batch.

Each way gives the loss summed over the labels and its gradient in prompts and gates, accumulated
over its micro-batches. An optimiser's step is left out: it is the same for all.
"""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adapter_kernels import linear_cross_entropy
from benchmarks.baselines import wider
from benchmarks.generate_models import CONFIGS, SETTINGS, THEIRS, random_model
from benchmarks.harness import Expected, expect
from benchmarks.roofline import DTYPES
from llama_adapter.adapter import Adapter
from llama_adapter.data.examples import IGNORE_INDEX, Example
from llama_adapter.data.packed import PackedBatch, Prefix, collate, micro_batches
from llama_adapter.trainer import GPU_ROWS
from llama_adapter.utilisation import linear_flops

Call = Callable[[], Mapping[str, Tensor]]
# Alpaca's records in LLaMA's tokens: a log-normal length, and the template's constant beginnings
MEDIAN, SPREAD, SHORTEST, LONGEST = 111, 0.52, 60, 512
PREFIXES, WITH_INPUT = (29, 39), 0.4
RESPONSE = 0.5
LORA: dict[str, Any] = {"r": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Setting:
    """A model and its batch.

    Attributes:
        model: name of its shape.
        records: of the batch.
        micro_tokens: tokens of a packed pass.
        micro_records: records of a padded pass.
        dtype: of the weights.
    """

    model: str
    records: int
    micro_tokens: int
    micro_records: int
    dtype: str

    def describe(self) -> str:
        """In words."""
        return (
            f"{self.model} {self.dtype}, {self.records} records, passes of {self.micro_tokens} "
            f"tokens or {self.micro_records} records"
        )


def alpaca_like(count: int, vocab_size: int, seed: int = 0) -> tuple[list[Example], list[Prefix]]:
    """Records of random tokens with Alpaca's lengths, and the two beginnings that they share."""
    # whatever the seed, as the template's are
    fixed, rng = random.Random(0), random.Random(seed)
    starts = [tuple(fixed.randrange(3, vocab_size) for _ in range(length)) for length in PREFIXES]
    made = []
    for index in range(count):
        start = starts[rng.random() < WITH_INPUT]
        length = round(MEDIAN * rng.lognormvariate(0, SPREAD))
        length = min(max(length, SHORTEST), LONGEST)
        rest = [rng.randrange(3, vocab_size) for _ in range(length - len(start))]
        masked = min(max(len(start) + 6, round(length * (1 - RESPONSE))), length - 2)
        tokens = (*start, *rest)
        labels = (*[IGNORE_INDEX] * masked, *tokens[masked:])
        made.append(Example(index, tokens, labels))
    return made, starts


def padded(examples: Sequence[Example], length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and labels (B, length), padded on the right."""
    tokens = torch.zeros(len(examples), length, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
    return tokens.to(device), labels.to(device)


class Problem:
    """The models, the batch, and every provider's step.

    Attributes:
        setting: what it is.
        examples: the batch.
        starts: the beginnings that its records share.
    """

    def __init__(self, setting: Setting, device: torch.device) -> None:
        """Make the base, its adapter and the batch."""
        self.setting, self.device = setting, device
        config = CONFIGS[setting.model]
        self.base = random_model(config, DTYPES[setting.dtype], device)
        generator = torch.Generator(device).manual_seed(3)
        with torch.device(device), torch.no_grad():
            self.adapter = Adapter(SETTINGS, config, generator=generator)
            self.adapter.gates.normal_(std=1.5, generator=generator)
            self.adapter.gates.copy_(self.adapter.gates.bfloat16())
        self.examples, self.starts = alpaca_like(setting.records, config.vocab_size)

    @property
    def tokens(self) -> int:
        """Of the records."""
        return sum(len(example.tokens) for example in self.examples)

    def facts(self, name: str) -> dict[str, float]:
        """What a provider's row says besides its time: tokens, and of ours what it computes."""
        found: dict[str, float] = {"tokens": self.tokens}
        if name in OURS:
            sizes = [self._computed(name, part) for part in self._parts(name)]
            tokens, rows = (sum(column) for column in zip(*sizes, strict=True))
            adapted = len(self.adapter.layers)
            found |= {
                "computed_tokens": tokens,
                "flop": linear_flops(self.base.config, tokens, rows, adapted),
            }
        return found

    def _computed(self, name: str, part: Sequence[Example]) -> tuple[int, int]:
        if name in PACKED:
            batch = self._pack(name, part)
            return len(batch.tokens), len(batch.rows)
        size = len(part) * self._length(name, part)
        return size, size - len(part)

    def _pack(self, name: str, part: Sequence[Example]) -> PackedBatch:
        on_gpu = self.device.type == "cuda"
        starts = self.starts if name == "shared_prefix" else ()
        # as the trainer does it
        return collate(part, starts, on_gpu, GPU_ROWS if on_gpu else 1).to(self.device)

    def _length(self, name: str, part: Sequence[Example]) -> int:
        """What a padded pass is padded to."""
        if name.endswith("_512"):
            return LONGEST
        whole = part if name in OTHERS else self.examples
        return max(len(example.tokens) for example in whole)

    def _parts(self, name: str) -> list[list[Example]]:
        if name in PACKED:
            starts = self.starts if name == "shared_prefix" else ()
            return list(micro_batches(self.examples, self.setting.micro_tokens, starts))
        size = self.setting.micro_records
        return [self.examples[at : at + size] for at in range(0, len(self.examples), size)]

    def call(self, name: str) -> Call:
        """A provider's step."""
        if name in OURS:
            return lambda: self._ours(name)
        return lambda: self._theirs(name, self._models[name.partition("_")[0]])

    def comparable(self, name: str) -> bool:
        """Whether a provider computes the truth's loss: LoRA is another method.

        litgpt 0.5.13 takes the prompts' keys and values from rows of its fused weight that belong
        to others, but where there is one key head. Its time is not changed by that.
        """
        if name.startswith("litgpt"):
            return self.base.config.kv_heads == 1
        return not name.startswith("lora")

    def expected(self) -> Mapping[str, Expected]:
        """PEFT's step in a wider dtype, within a few times the error of it in the own."""
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        eager = self._theirs("peft_padded", self._models["peft"])
        wide = copy.deepcopy(self._models["peft"]).to(wider(DTYPES[self.setting.dtype]))
        # kept in float32, whatever the model's dtype
        wide.model.rotary_emb = LlamaRotaryEmbedding(wide.config).to(self.device)
        return expect(self._theirs("peft_padded", wide), eager)

    def _ours(self, name: str) -> Mapping[str, Tensor]:
        base, adapter = self.base, self.adapter
        adapter.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for part in self._parts(name):
            prompts = base.project(adapter)
            if name in PACKED:
                batch = self._pack(name, part)
                hidden = base.hidden_packed(batch.tokens, batch.packing, prompts)
                hidden, targets, ignored = hidden[batch.rows], batch.targets, None
            else:
                tokens, labels = padded(part, self._length(name, part), self.device)
                hidden, targets = base.hidden(tokens, prompts)[:, :-1], labels[:, 1:]
                ignored = IGNORE_INDEX
            loss = linear_cross_entropy(
                hidden, base.output_weight, targets, ignore_index=ignored, reduction="sum"
            )
            loss.backward()
            total += loss.detach()
        prompts, gates = adapter.prompts.grad, adapter.gates.grad
        assert prompts is not None
        assert gates is not None
        return {"loss": total[None], "dprompts": prompts, "dgates": gates}

    @cached_property
    def _models(self) -> dict[str, Any]:
        """transformers' models by name, over the weights of ours."""
        from peft import LoraConfig, get_peft_model

        from benchmarks.generate_theirs import Theirs

        theirs, other = Theirs(self.base, self.adapter), Theirs(self.base, self.adapter)
        adapted = theirs.adapted.model
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_("adaption_" in name)
        lora = get_peft_model(other.plain.model, LoraConfig(**LORA))
        models = {"peft": adapted, "lora": lora}
        if absent("litgpt_padded") is None:
            from benchmarks.train_step_litgpt import LitGPT

            models["litgpt"] = LitGPT(self.base, self.adapter)
        return models

    def _theirs(self, name: str, model: Any) -> Mapping[str, Tensor]:
        model.zero_grad(set_to_none=True)
        litgpt = name.startswith("litgpt")
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for part in self._parts(name):
            tokens, labels = padded(part, self._length(name, part), self.device)
            found = model(tokens) if litgpt else model(input_ids=tokens, use_cache=False).logits
            logits = found[:, :-1]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX,
                reduction="sum",
            )  # fmt: skip
            loss.backward()
            total += loss.detach()
        if name.startswith("lora"):
            return {"loss": total[None]}
        if litgpt:
            prompts, gates = model.gradients()
            return {"loss": total[None], "dprompts": prompts, "dgates": gates}
        grads = dict(_adaption_gradients(model))
        shape = self.adapter.prompts.shape
        prompts = torch.stack([grads[name] for name in grads if "prompt" in name]).view(shape)
        gates = torch.stack([grads[name] for name in grads if "gate" in name]).view(-1, 1)
        return {"loss": total[None], "dprompts": prompts, "dgates": gates}


def _adaption_gradients(model: Any) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if "adaption_" in name:
            yield name, parameter.grad


PACKED = ("packed", "shared_prefix")
OURS = ("padded_512", "padded_batch", *PACKED)
OTHERS = ("peft_512", "peft_padded", "litgpt_padded", "lora_padded")


def absent(name: str = "peft_padded") -> str | None:
    """The package that a provider needs and that is missing, or None."""
    needed = (*THEIRS, "litgpt") if name.startswith("litgpt") else THEIRS
    return next((package for package in needed if find_spec(package) is None), None)
