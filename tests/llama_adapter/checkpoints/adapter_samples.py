"""Files of other programs by their documented names, and their formulas written out in float64.

Random numbers everywhere: prompts N(0, 1), gates of std 1.5, biases, scales and norms that matter.
Nothing here uses the package's own readers or writers.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llama_adapter.checkpoints.adapter_assembly import StoredAdapter
from llama_adapter.config import LlamaConfig
from llama_adapter.model import Llama

CONFIG = LlamaConfig(dim=32, n_layers=4, n_heads=4, vocab_size=40, multiple_of=8)
WIDTHS = {"wq": (32, 32), "wk": (32, 32), "wv": (32, 32), "wo": (32, 32)} | {
    "w1": (32, 88),
    "w2": (88, 32),
    "w3": (32, 88),
}
ATTENTION = ("wq", "wk", "wv", "wo")
PROMPT_LENGTH, ADAPTED = 10, 2
Map = Callable[[str, Tensor], Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_model(config: LlamaConfig = CONFIG) -> Llama:
    """Random weights that make logits of a few units and norms that differ from one."""
    model, source = Llama(config), generator(5)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=source)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=source)
    return model.requires_grad_(False).eval()


def random_tokens(config: LlamaConfig = CONFIG) -> Tensor:
    return torch.randint(0, config.vocab_size, (2, 19), generator=generator(3))


def place(layer: int, linear: str) -> str:
    """Meta's name of a linear map."""
    return f"layers.{layer}.{'attention' if linear in ATTENTION else 'feed_forward'}.{linear}"


def prompt_tensors(prefix: str = "", *, scalar: bool = False) -> dict[str, Tensor]:
    """adapter_query and the gates, 0 below the last two layers."""
    source = generator(7)
    found = {"adapter_query.weight": torch.randn(ADAPTED * PROMPT_LENGTH, 32, generator=source)}
    for layer in range(4):
        gate = torch.randn((1,) if scalar else (1, 4, 1, 1), generator=source) * 1.5
        found[f"{prefix}layers.{layer}.attention.gate"] = gate * (layer >= 4 - ADAPTED)
    return found


def norm_tensors(prefix: str = "") -> dict[str, Tensor]:
    source = generator(8)
    names = [
        f"layers.{i}.{name}.weight" for i in range(4) for name in ("attention_norm", "ffn_norm")
    ]
    return {
        prefix + name: torch.rand(32, generator=source) + 0.5 for name in (*names, "norm.weight")
    }


def chat_tensors(*, prompts: bool) -> dict[str, Tensor]:
    """chat65b: a scale of the input's width and a bias of the output's, for seven maps.

    It has no gates in layers without prompts.
    """
    source = generator(9)
    found = norm_tensors()
    if prompts:
        gateless = ("layers.0.", "layers.1.")
        found |= {n: v for n, v in prompt_tensors().items() if not n.startswith(gateless)}
    for layer in range(4):
        for linear, (n_in, n_out) in WIDTHS.items():
            found[f"{place(layer, linear)}_scale"] = torch.rand(n_in, generator=source) + 0.5
            found[f"{place(layer, linear)}_bias"] = torch.randn(n_out, generator=source) * 0.3
    return found


def bias_tensors(prefix: str) -> dict[str, Tensor]:
    """Multimodal 7B's and Accessory's: biases of five maps, and norms."""
    source, found = generator(10), norm_tensors(prefix)
    for layer in range(4):
        for linear in ("wq", "wo", "w1", "w2", "w3"):
            n_out = WIDTHS[linear][1]
            found[f"{prefix}{place(layer, linear)}.bias"] = (
                torch.randn(n_out, generator=source) * 0.3
            )
    return found


def multimodal_tensors(prefix: str = "llama.") -> dict[str, Tensor]:
    return prompt_tensors(prefix) | bias_tensors(prefix)


def lora_tensors(names: Callable[[str, str], tuple[str, str]]) -> dict[str, Tensor]:
    """A (3, in) and B (out, 3) of seven maps, by a format's names of (place, linear)."""
    source, found = generator(14), dict[str, Tensor]()
    for layer in range(4):
        for linear, (n_in, n_out) in WIDTHS.items():
            first, second = names(place(layer, linear), linear)
            found[first] = torch.randn(3, n_in, generator=source) * 0.2
            found[second] = torch.randn(n_out, 3, generator=source) * 0.2
    return found


def accessory_tensors() -> dict[str, Tensor]:
    source = generator(11)
    return bias_tensors("llma.") | {
        "llma.prefix": torch.randn(ADAPTED, 1, PROMPT_LENGTH, 32, generator=source),
        "llma.prefix_gate": torch.randn(ADAPTED, 4, generator=source) * 1.5,
        "llma.prefix_new_gate": torch.ones(ADAPTED),
    }


def peft_tensors() -> dict[str, Tensor]:
    source, found = generator(12), dict[str, Tensor]()
    for layer in (2, 3):
        at = f"base_model.model.model.layers.{layer}.self_attn.adaption"
        found[f"{at}_prompt"] = torch.randn(1, PROMPT_LENGTH, 32, generator=source)
        found[f"{at}_gate"] = torch.randn(1, generator=source) * 1.5
    return found


def litgpt_tensors(config: LlamaConfig = CONFIG, *, version: int = 1) -> dict[str, Tensor]:
    """A gate per head at the third place; in version 2 bias and scale of the output's width."""
    source, found = generator(13), dict[str, Tensor]()
    for layer in (2, 3):
        at = f"transformer.h.{layer}.attn"
        found[f"{at}.adapter_wte.weight"] = torch.randn(PROMPT_LENGTH, config.dim, generator=source)
        gate = torch.randn(1, 1, config.n_heads, 1, generator=source) * 1.5
        found[f"{at}.gating_factor"] = gate
    if version == 1:
        return found
    qkv = (config.n_heads + 2 * config.kv_heads) * config.head_dim
    widths = {"attn.qkv": qkv, "attn.proj": config.dim, "mlp.proj": config.dim}
    widths |= {"mlp.fc_1": config.hidden_dim, "mlp.fc_2": config.hidden_dim}
    maps = {f"transformer.h.{i}.{n}": width for i in range(4) for n, width in widths.items()}
    for name, width in (maps | {"lm_head": config.vocab_size}).items():
        found[f"{name}.adapter_bias"] = torch.randn(width, generator=source) * 0.3
        found[f"{name}.adapter_scale"] = torch.rand(width, generator=source) + 0.5
    norms = [f"transformer.h.{i}.norm_{n}.weight" for i in range(4) for n in (1, 2)]
    for name in (*norms, "transformer.ln_f.weight"):
        found[name] = torch.rand(config.dim, generator=source) + 0.5
    return found


def transcribe(
    model: Llama,
    tokens: Tensor,
    linear: Callable[[str, Tensor, Tensor], Tensor] = lambda name, x, w: x @ w.T,
    norms: Mapping[str, Tensor] | None = None,
    prompts: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    of_prompts: Callable[[str, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Logits (B, T, V) of the papers' equations in float64, one sequence and one head at a time.

    Args:
        model: the base.
        tokens: (B, T).
        linear: y of (name, x, weight), the format's linear map.
        norms: weights in place of the base's.
        prompts: layer to rows (P, C) and the multipliers (H,) of their attention.
        of_prompts: the linear map of their keys and values; None is that of tokens.
    """
    config = model.config
    weights = {name: value.double() for name, value in model.state_dict().items()}
    weights |= {name: value.double() for name, value in (norms or {}).items()}
    width, ratio = config.head_dim, config.n_heads // config.kv_heads

    def norm(x: Tensor, name: str) -> Tensor:
        root = (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
        return x / root * weights[f"{name}.weight"]

    def apply(name: str, x: Tensor) -> Tensor:
        return linear(name, x, weights[f"{name}.weight"])

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.arange(0, width, 2).double()
        angle = torch.outer(torch.arange(len(x)).double(), config.rope_theta ** (-pairs / width))
        turned = torch.view_as_complex(x.reshape(len(x), -1, 2)) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.view_as_real(turned).flatten(1)

    def sequence(row: Tensor) -> Tensor:
        x = weights["tok_embeddings.weight"][row]
        later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        for layer in range(config.n_layers):
            at = f"layers.{layer}"
            normed = norm(x, f"{at}.attention_norm")
            q, k, v = (apply(f"{at}.attention.{name}", normed) for name in ("wq", "wk", "wv"))
            heads = []
            for h in range(config.n_heads):
                own = slice(h * width, (h + 1) * width)
                key = slice(h // ratio * width, (h // ratio + 1) * width)
                query = rotate(q[:, own]) / math.sqrt(width)
                scores = (query @ rotate(k[:, key]).T).masked_fill(later, -math.inf)
                out = scores.softmax(-1) @ v[:, key]
                if prompts and layer in prompts:
                    rows, gate = prompts[layer]
                    pk, pv = (
                        (of_prompts or linear)(
                            f"{at}.attention.{name}",
                            rows.double(),
                            weights[f"{at}.attention.{name}.weight"],
                        )[:, key]
                        for name in ("wk", "wv")
                    )
                    out = out + gate.double()[h] * ((query @ pk.T).softmax(-1) @ pv)
                heads.append(out)
            x = x + apply(f"{at}.attention.wo", torch.cat(heads, 1))
            normed = norm(x, f"{at}.ffn_norm")
            w1, w3 = (apply(f"{at}.feed_forward.{name}", normed) for name in ("w1", "w3"))
            x = x + apply(f"{at}.feed_forward.w2", torch.nn.functional.silu(w1) * w3)
        return apply("output", norm(x, "norm"))

    return torch.stack([sequence(row) for row in tokens]).float()


@torch.no_grad()
def assert_logits(stored: StoredAdapter, model: Llama, tokens: Tensor, expected: Tensor) -> None:
    """The model with an adapter gives these logits, and others without it."""
    prompts = model.project(stored.adapter(model.config))
    got = model(tokens, prompts)
    assert (got - model(tokens)).abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path
