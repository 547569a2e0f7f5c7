"""A base, an adapter or none, and what sees images for them: whatever answers instructions.

The commands' options become one `Answerer`, which gives every text the prompts of its own image.
Experts (LLaMA-Adapter V2, section 4.4) put what they say of an image beside the instruction.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from llama_adapter import assets
from llama_adapter.adapter import Adapter, Prompts
from llama_adapter.checkpoints import Base, default_device, load_base
from llama_adapter.checkpoints.adapter_file import load_adapter
from llama_adapter.checkpoints.quantize import FORMATS
from llama_adapter.completion import Piece
from llama_adapter.data.template import prompt_text
from llama_adapter.generation import stream
from llama_adapter.multimodal.experts import CAPTION_INSTRUCTION, Expert, Ocr
from llama_adapter.multimodal.pictures import Pictures
from llama_adapter.recipe import DTYPES
from llama_adapter.sampling import SamplingConfig
from llama_adapter.vision import VisionOptions

Image = str | Path
CAPTION_SAMPLING = SamplingConfig(temperature=0.0, max_new_tokens=64)


@dataclass(frozen=True)
class ModelOptions:
    """Model."""

    base: Path = field(
        default=assets.BASE,
        metadata={
            "help": "folder of the base model, Meta's, Hugging Face's or litgpt's; the bundled one"
        },
    )
    adapter: Path | None = field(
        default=None, metadata={"help": "adapter file; without it the base answers alone"}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "of the base's weights; default: the files' own",
            "choices": DTYPES,
        },
    )
    device: str | None = field(
        default=None, metadata={"help": "cpu or cuda; default: the GPU, if there is one"}
    )
    quantize: str | None = field(
        default=None,
        metadata={
            "help": "hold the base's linear weights in 8 or 4 bits; default: as they are",
            "choices": tuple(FORMATS),
        },
    )

    threads: int | None = field(
        default=None,
        metadata={"help": "CPU threads; default: torch's choice. One is enough for a small base"},
    )

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")

    def load(self, vision: VisionOptions | None = None, *, progress: bool = False) -> "Answerer":
        """The base with its adapter; arguments as `Answerer`."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = default_device() if self.device is None else self.device
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        base = load_base(self.base, dtype=dtype, device=device, quantize=self.quantize)
        return Answerer(base, None, vision, progress=progress).with_adapter(self.adapter)


class Answerer:
    """Answers texts, each with its own image or with none.

    Attributes:
        base: the model and its tokenizer.
        adapter: what the prompts come from; None answers with the base alone.
        vision: where images and their encoder lie.
    """

    def __init__(
        self,
        base: Base,
        adapter: Adapter | None = None,
        vision: VisionOptions | None = None,
        *,
        progress: bool = False,
    ) -> None:
        """Nothing is projected and no encoder is loaded before somebody asks.

        Args:
            base: see above.
            adapter: see above.
            vision: see above; None where there are no images.
            progress: show a bar on stderr while images are encoded.
        """
        self.base, self.adapter, self._progress = base, adapter, progress
        self.vision = VisionOptions() if vision is None else vision

    def with_adapter(self, path: Path | None) -> "Answerer":
        """The same base and images with the adapter of a file, or without one.

        Raises:
            OSError, ValueError: as `load_adapter`.
        """
        if path is None:
            return Answerer(self.base, None, self.vision, progress=self._progress)
        base = self.base
        adapter = load_adapter(path, base.model, base.name, base=base.fingerprint)
        return Answerer(base, adapter, self.vision, progress=self._progress)

    @cached_property
    def prompts(self) -> Prompts | None:
        """The adapter's prompts without an image, projected once."""
        if self.adapter is None:
            return None
        with torch.no_grad():
            return self.base.model.project(self.adapter)

    @property
    def sees(self) -> bool:
        """Whether images make a difference."""
        return self.adapter is not None and self.adapter.projector is not None

    @cached_property
    def pictures(self) -> Pictures:
        """The encoder that the adapter was trained with.

        Raises:
            FileNotFoundError, ValueError: as `Pictures.load`; or the adapter takes no images.
        """
        projector = None if self.adapter is None else self.adapter.projector
        if projector is None:
            what = "the base alone" if self.adapter is None else "this adapter"
            raise ValueError(f"image must be left out: {what} takes none")
        device = self.base.model.output_weight.device
        return Pictures.load(
            self.vision, visual=projector.config, device=device, progress=self._progress
        )

    @torch.no_grad()
    def prompts_for(self, images: Sequence[Image | None]) -> Prompts | None:
        """Prompts of a batch whose texts have these images, None for one without.

        They are projected together, 4.9 MB a text for 7B: ask for some tens at a time.

        Raises:
            FileNotFoundError, ValueError: as `pictures`, and as an image that cannot be used.
        """
        if self.adapter is None or all(image is None for image in images):
            if any(image is not None for image in images):
                _ = self.pictures
            return self.prompts
        features, present = self.pictures(images)
        device = self.adapter.prompts.device
        tokens = self.adapter.visual_tokens(features.to(device), present.to(device))
        return self.base.model.project(self.adapter, tokens)

    def stream(
        self,
        texts: Sequence[str],
        sampling: SamplingConfig,
        *,
        images: Sequence[Image | None] | None = None,
        row_seeds: Sequence[int] | None = None,
        max_batch: int | None = None,
    ) -> Iterator[Piece]:
        """`generation.stream` with this adapter's prompts and the texts' images."""
        return stream(
            self.base.model,
            self.base.tokenizer,
            texts,
            sampling,
            prompts=self.prompts_for([None] * len(texts) if images is None else images),
            row_seeds=row_seeds,
            max_batch=max_batch,
        )

    def answers(
        self,
        texts: Sequence[str],
        sampling: SamplingConfig,
        *,
        images: Sequence[Image | None] | None = None,
        row_seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """What `stream` says in all, in the order of the texts."""
        found = {
            piece.row: piece.completion.text
            for piece in self.stream(texts, sampling, images=images, row_seeds=row_seeds)
            if piece.completion is not None
        }
        return [found[row] for row in range(len(texts))]


class Captioner:
    """An expert that is another adapter of the same base: its caption of an image.

    Source: LLaMA-Adapter V2, section 4.4, whose expert is an adapter trained on COCO's captions.
    """

    def __init__(
        self,
        answerer: Answerer,
        instruction: str = CAPTION_INSTRUCTION,
        sampling: SamplingConfig = CAPTION_SAMPLING,
    ) -> None:
        """Take an answerer whose adapter makes captions.

        Raises:
            ValueError: its adapter takes no images.
        """
        if not answerer.sees:
            raise ValueError("a captioner must have an adapter that takes images, got one without")
        self._answerer, self._text, self._sampling = answerer, prompt_text(instruction), sampling

    def __call__(self, image: Path) -> str | None:
        """The caption, or None where it is empty."""
        return self._answerer.answers([self._text], self._sampling, images=[image])[0].strip()


@dataclass(frozen=True)
class ExpertOptions:
    """Experts, whose words on an image become a part of the input; none unless named."""

    expert: tuple[str, ...] = field(
        default=(),
        metadata={"help": "ocr, the text in the image, or caption, what another adapter sees"},
    )
    caption_adapter: Path | None = field(
        default=None, metadata={"help": "adapter file whose captions --expert caption takes"}
    )
    ocr_language: str = field(
        default="eng", metadata={"help": "of --expert ocr, one that tesseract has data of"}
    )

    def __post_init__(self) -> None:
        unknown = [name for name in self.expert if name not in EXPERTS]
        if unknown:
            raise ValueError(f"expert must be one of {', '.join(EXPERTS)}, got {unknown[0]!r}")
        if ("caption" in self.expert) != (self.caption_adapter is not None):
            raise ValueError("--expert caption and --caption-adapter go together, got one of them")

    def experts(self, answerer: Answerer) -> dict[str, Expert]:
        """The experts by name, in the order in which they were named.

        Raises:
            OSError, ValueError: as whatever an expert needs.
        """
        return {name: EXPERTS[name](self, answerer) for name in self.expert}


def _captioner(options: ExpertOptions, answerer: Answerer) -> Expert:
    adapter = answerer.with_adapter(options.caption_adapter).adapter
    # an expert is handed the file itself
    return Captioner(Answerer(answerer.base, adapter, replace(answerer.vision, images=None)))


def _reader(options: ExpertOptions, answerer: Answerer) -> Expert:
    try:
        return Ocr(options.ocr_language)
    except RuntimeError as error:
        raise ValueError(f"--expert ocr: {error}") from error


EXPERTS: dict[str, Callable[[ExpertOptions, Answerer], Expert]] = {
    "ocr": _reader,
    "caption": _captioner,
}
