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


CLIP_WIDTH, CLIP_TOKENS = 12, 257


def visual_tensors(prefix: str = "", queries: str = "visual_query.weight") -> dict[str, Tensor]:
    """Two blocks of 16 heads of width 2, ten queries, and what is before and after."""
    source, width = generator(15), 32
    shapes = {"clip_proj": (width, CLIP_WIDTH), "clip_proj_norm": (width,)}
    for i in range(2):
        at = f"visual_blocks.{i}"
        shapes |= {f"{at}.norm1": (width,), f"{at}.norm2": (width,)}
        shapes |= {f"{at}.attn.qkv": (3 * width, width), f"{at}.attn.proj": (width, width)}
        shapes |= {f"{at}.mlp.fc1": (4 * width, width), f"{at}.mlp.fc2": (width, 4 * width)}
    shapes |= {"visual_proj": (32, width), "visual_proj_norm": (32,)}
    found = {f"{prefix}{queries}": torch.randn(PROMPT_LENGTH, width, generator=source)}
    for name, shape in shapes.items():
        scale = 0.5 if len(shape) == 1 else shape[-1] ** -0.5
        value = torch.randn(shape, generator=source) * scale
        found[f"{prefix}{name}.weight"] = value + 1.0 if len(shape) == 1 else value
        found[f"{prefix}{name}.bias"] = torch.randn(shape[0], generator=source) * 0.3
    return found


def see(tensors: Mapping[str, Tensor], queries: str, tokens: Tensor) -> Tensor:
    """(P, C) of the tokens (S, E) of one image, as the official code computes it, in float64."""
    t = {name: value.double() for name, value in tensors.items()}

    def apply(name: str, x: Tensor) -> Tensor:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    x = torch.cat([t[queries], norm("clip_proj_norm", apply("clip_proj", tokens.double()))])
    for i in range(2):
        at = f"visual_blocks.{i}"
        q, k, v = apply(f"{at}.attn.qkv", norm(f"{at}.norm1", x)).chunk(3, -1)
        heads = []
        for own in range(0, x.shape[1], x.shape[1] // 16):
            part = slice(own, own + x.shape[1] // 16)
            scores = q[:, part] @ k[:, part].T / math.sqrt(x.shape[1] // 16)
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + apply(f"{at}.attn.proj", torch.cat(heads, 1))
        inner = apply(f"{at}.mlp.fc1", norm(f"{at}.norm2", x))
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = x + apply(f"{at}.mlp.fc2", inner)
    return norm("visual_proj_norm", apply("visual_proj", x[:PROMPT_LENGTH]))


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
