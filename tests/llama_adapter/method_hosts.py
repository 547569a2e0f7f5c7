"""Small hosts with something to call and to learn, for the tests of the methods on them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from llama_adapter.hosts.methods import Attached, MethodOptions, attach
from tests.llama_adapter.encoder_models import bert, clip, padded, pixels, roberta, vit, words

# beside the defaults, small; CoOp's template is of three words
SMALL = {"prompt_length": 4, "reduction": 4, "template_length": 3}
VIT, ROBERTA, CLIP = "ViT-B/16", "RoBERTa-large", "CLIP ViT-B/16"


@dataclass(frozen=True)
class Case:
    """A host, what it is called with, and a loss of its output."""

    make: Callable[[], Any]
    inputs: dict[str, Tensor]
    labels: dict[str, Tensor]
    output: str = "logits"

    def run(self, model: Any) -> Tensor:
        """The host's answer, of all that it was asked."""
        out = model(**self.inputs)
        found = [out[name] for name in self.output.split()]
        return torch.stack(found, -1) if len(found) > 1 else found[0]

    def loss(self, model: Any) -> Tensor:
        """What a few pictures or sentences have to say."""
        return model(**self.inputs, **self.labels).loss


def padded_words(pad: int) -> dict[str, Tensor]:
    """Words (3, 13) whose padding, behind them, is masked."""
    mask = padded()
    return {"input_ids": torch.where(mask.bool(), words(), pad), "attention_mask": mask}


def _labels() -> Tensor:
    made = torch.randint(0, 5, (3, 13), generator=torch.Generator().manual_seed(5))
    return torch.where(padded().bool(), made, -100)


@torch.no_grad()
def sharp_clip() -> Any:
    """A CLIP that tells pictures apart as trained ones do."""
    model = clip()
    model.logit_scale.fill_(4.0)
    return model


CASES: dict[str, Case] = {
    "vit": Case(vit, {"pixel_values": pixels()}, {"labels": torch.tensor([0, 3, 2])}),
    "roberta": Case(roberta, padded_words(1), {"labels": _labels()}),
    "bert": Case(
        lambda: bert("QuestionAnswering", 2),
        padded_words(0),
        {"start_positions": torch.tensor([1, 7, 4]), "end_positions": torch.tensor([3, 8, 12])},
        "start_logits end_logits",
    ),
    "clip": Case(
        sharp_clip,
        {"pixel_values": pixels(), "input_ids": words()},
        {"return_loss": torch.tensor(True)},
        "logits_per_image",
    ),
}


def attached(model: Any, name: str, seed: int = 7, **options: Any) -> Attached:
    """A method with small options and random numbers, gates among them, all far from zero."""
    generator = torch.Generator().manual_seed(seed)
    made = attach(model, name, MethodOptions(**SMALL | options), generator=generator)
    disturb(made, generator)
    return made


@torch.no_grad()
def disturb(made: Attached, generator: torch.Generator, std: float = 0.3) -> None:
    """Add random numbers to all that is trained; to gates such that some are beyond one."""
    for name, parameter in made.parameters().items():
        spread = 1.5 if "gate" in name else std
        parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)


def real(name: str) -> Any:
    """A model of a real shape, without numbers."""
    base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        if name == VIT:
            config = transformers.ViTConfig(num_labels=100)
            return transformers.ViTForImageClassification(config)
        if name == ROBERTA:
            large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
            large |= {"intermediate_size": 4096, "vocab_size": 50265}
            config = transformers.RobertaConfig(
                **large, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1
            )
            return transformers.RobertaForQuestionAnswering(config)
        vision = base | {"intermediate_size": 3072, "patch_size": 16, "image_size": 224}
        config = transformers.CLIPConfig(vision_config=vision, projection_dim=512)
        return transformers.CLIPModel(config)
