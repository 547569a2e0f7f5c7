"""What sees images in the official multimodal 7B and in Accessory's files: queries of a CLIP.

    clip_proj (W, E), clip_proj_norm; visual_query (P, W); visual_proj (C, W), visual_proj_norm
    visual_blocks.{i}.norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2

P tokens come out, which are added to the P rows of every prompt, each to its own. CLIP is ViT-L/14,
of which all 257 tokens come in, normed and projected; its own weights, frozen, are not read.
"""

import re

from torch import Tensor

from llama_adapter.checkpoints.adapter_assembly import Pieces, ReadOptions
from llama_adapter.checkpoints.adapter_source import Source
from llama_adapter.config import Resampler, VisualConfig
from llama_adapter.vision import Scales

PARTS = r"(clip_proj|clip_proj_norm|visual_(query|blocks|proj|proj_norm))(\..*)?"
FROZEN = r"clip\..*"
# the files do not say them: the official code has them
HEADS, CLIP_TOKENS = 16, 257
CLIP_SCALES = Scales(layers=(24,), pool="tokens", post_norm=True, project=True)
# our names of a block's parts to theirs
_BLOCK = {
    "norm1": "norm1",
    "self_attn.out_proj": "attn.proj",
    "norm2": "norm2",
    "linear1": "mlp.fc1",
    "linear2": "mlp.fc2",
}


def take_visual(source: Source, queries: str, options: ReadOptions, pieces: Pieces) -> None:
    """Take the projector that a file holds, if any, or leave it aside where asked for.

    Args:
        source: the file.
        queries: the name of the queries.
        options: may leave out "visual".
        pieces: has the prompts, and receives the projector and what was assumed.

    Raises:
        ValueError: a part is missing or does not fit the others or the prompts.
    """
    if frozen := source.drop(FROZEN):
        pieces.notes.append(f"left out: {len(frozen)} tensors of the frozen CLIP")
    if "visual" in options.leave_out:
        if dropped := source.drop(PARTS):
            pieces.notes.append(
                f"left out: {len(dropped)} visual tensors, from {dropped[0]} on (answers about "
                "images change without them)"
            )
        return
    if not any(re.fullmatch(PARTS, name) for name in source.names):
        return
    if pieces.prompts is not None:
        source.sizes["prompt_length"] = pieces.prompts.shape[1]
    try:
        pieces.visual, pieces.projector = _projector(source, queries)
    except ValueError as error:
        raise ValueError(f"{error}; --leave-out visual reads the text part alone") from None
    pieces.notes.append(
        f"images: the {CLIP_TOKENS} tokens of a CLIP ViT-L/14, and blocks of {HEADS} heads, as the "
        "official code has them; a text alone gets nothing added, where multimodal 7B's code adds "
        "what it makes of a black picture"
    )


def _projector(source: Source, queries: str) -> tuple[VisualConfig, dict[str, Tensor]]:
    """The shape of the projector, and its parameters by our names."""
    found: dict[str, Tensor] = {}

    def take(name: str, theirs: str, *shape: str | int) -> None:
        found[f"{name}.weight"] = source.take(f"{theirs}.weight", *shape)
        found[f"{name}.bias"] = source.take(f"{theirs}.bias", shape[0])

    found["queries"] = source.take(queries, "prompt_length", "visual_width")
    take("map_in", "clip_proj", "visual_width", "clip_width")
    take("norm_in", "clip_proj_norm", "visual_width")
    width = source.sizes["visual_width"]
    count = max(source.layer_numbers(r"visual_blocks\.(\d+)\..*"), default=-1) + 1
    if not count or width % HEADS:
        raise ValueError(
            f"{source.path} must have visual_blocks of {HEADS} heads, got {count} of width {width}"
        )
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.out_proj": (width, width),
        "linear1": (4 * width, width),
        "linear2": (width, 4 * width),
    }
    for number in range(count):
        at, theirs = f"blocks.{number}", f"visual_blocks.{number}"
        for kind, shape in (("weight", (3 * width, width)), ("bias", (3 * width,))):
            value = source.take(f"{theirs}.attn.qkv.{kind}", *shape)
            found[f"{at}.self_attn.in_proj_{kind}"] = value
        for name, part in _BLOCK.items():
            take(f"{at}.{name}", f"{theirs}.{part}", *shapes.get(name, (width,)))
    take("map_out", "visual_proj", "dim", "visual_width")
    take("norm_out", "visual_proj_norm", "dim")
    inputs = source.sizes["clip_width"]
    visual = VisualConfig(
        CLIP_TOKENS * inputs,
        (),
        "gelu",
        tokens=len(found["queries"]),
        scales=CLIP_SCALES,
        resampler=Resampler(inputs, width, count, HEADS),
    )
    return visual, found
