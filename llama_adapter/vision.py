"""What is taken of an image, and where images and their encoder lie: options, and no tensors.

The encoder is a folder of a CLIP that transformers saved. Which of its features an adapter was
trained on is a part of the adapter's file, so that whoever uses it names the folder alone.
"""

from dataclasses import dataclass, field
from pathlib import Path

POOLS = ("cls", "mean", "tokens")


@dataclass(frozen=True)
class Scales:
    """Which global features of an image are taken; the paper says "multi-scale", and no more.

    Attributes:
        layers: of the encoder, after which a feature is taken, from 1.
        pool: "cls", the class token's state, "mean", that of the patches, or "tokens", the states
            of the class token and of all patches side by side.
        post_norm: apply the encoder's last norm to each.
        project: apply CLIP's projection to each, which needs post_norm.
        normalise: divide each by its length.
    """

    layers: tuple[int, ...] = (2, 4, 6, 8, 10, 12)
    pool: str = "cls"
    post_norm: bool = False
    project: bool = False
    normalise: bool = False

    def __post_init__(self) -> None:
        if not self.layers or min(self.layers) < 1:
            raise ValueError(f"layers must be numbers from 1, at least one, got {self.layers}")
        if self.pool not in POOLS:
            raise ValueError(f"pool must be one of {POOLS}, got {self.pool!r}")
        if self.project and not self.post_norm:
            raise ValueError("project needs post_norm: CLIP projects what it has normed")


@dataclass(frozen=True)
class VisionOptions:
    """Images."""

    vision_model: Path | None = field(
        default=None,
        metadata={
            "help": "folder of the CLIP that sees the images, as transformers saves one",
            "recipe": False,
        },
    )
    images: Path | None = field(
        default=None,
        metadata={
            "help": "folder that the records' paths of images start from, and do not leave",
            "recipe": False,
        },
    )
    feature_cache: Path | None = field(
        default=None,
        metadata={
            "help": "folder that keeps what the CLIP saw; default: $LLAMA_ADAPTER_CACHE/features, "
            "or among the user's caches",
            "recipe": False,
        },
    )


@dataclass(frozen=True)
class ScaleOptions:
    """What is taken of an image; an adapter's file remembers it."""

    vision_layers: tuple[int, ...] = field(
        default=Scales.layers,
        metadata={"help": "layers of the CLIP whose global features are taken", "recipe": True},
    )
    vision_pool: str = field(
        default=Scales.pool,
        metadata={
            "help": "a layer's feature: its class token, the mean of its patches, or all of both",
            "choices": POOLS,
            "recipe": True,
        },
    )
    vision_post_norm: bool = field(
        default=Scales.post_norm,
        metadata={"help": "apply the CLIP's last norm to each", "recipe": True},
    )
    vision_project: bool = field(
        default=Scales.project,
        metadata={"help": "apply the CLIP's projection to each", "recipe": True},
    )
    vision_normalise: bool = field(
        default=Scales.normalise,
        metadata={"help": "divide each by its length", "recipe": True},
    )

    def __post_init__(self) -> None:
        _ = self.scales

    @property
    def scales(self) -> Scales:
        """The same without the options' names."""
        return Scales(
            tuple(self.vision_layers),
            self.vision_pool,
            self.vision_post_norm,
            self.vision_project,
            self.vision_normalise,
        )
