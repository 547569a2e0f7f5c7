"""What other systems say of an image, as text beside the instruction; nothing is trained for it.

An expert is any callable from an image file to text: a captioner, a reader of text, a detector, a
search. What it says becomes the input of the papers' prompt template, so that a wrong word of it
may mislead the model: experts are off unless given, and what they said is part of the result.
Source: LLaMA-Adapter V2, section 4.4.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

Expert = Callable[[Path], str | None]
# what an image's caption is asked for with: LLaMA-Adapter, section 4.2
CAPTION_INSTRUCTION = "Generate caption for this image"


@dataclass(frozen=True)
class Context:
    """What experts said of an image.

    Attributes:
        said: by the name of each expert that said something.
        text: all of it, for the input of `prompt_text`; "" where nobody said anything.
    """

    said: Mapping[str, str]
    text: str


def context_of(
    image: str | Path,
    experts: Mapping[str, Expert],
    *,
    template: str = "{name}: {text}",
    most: int = 1000,
) -> Context:
    """Ask experts about an image.

    Args:
        image: its file.
        experts: by the name that the text has; asked in this order.
        template: of what one says, with {name} and {text}; what several say is on lines of its own.
        most: characters kept of what one says, the first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the template lacks {text}, or most is below 1.
        Exception: whatever an expert raises.
    """
    path = Path(image)
    if "{text}" not in template:
        raise ValueError(f"template must contain {{text}}, got {template!r}")
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return _context({name: expert(path) or "" for name, expert in experts.items()}, most, template)


def shortened(context: Context, most: int, *, template: str = "{name}: {text}") -> Context:
    """A context of which at most so many characters of what each expert said are kept."""
    return _context(context.said, most, template)


def _context(texts: Mapping[str, str], most: int, template: str) -> Context:
    kept = {name: text.strip()[:most].strip() for name, text in texts.items()}
    said = {name: text for name, text in kept.items() if text}
    return Context(said, "\n".join(_filled(template, *one) for one in said.items()))


def _filled(template: str, name: str, text: str) -> str:
    """A template with its places filled; braces in what fills them are no places."""
    parts = re.split(r"(\{name\}|\{text\})", template)
    return "".join({"{name}": name, "{text}": text}.get(part, part) for part in parts)


class Ocr:
    """Reads the text of an image, its lines numbered, by tesseract.

    It needs `pip install '.[ocr]'` and tesseract's own program.
    """

    def __init__(self, language: str = "eng") -> None:
        """Find tesseract.

        Args:
            language: one that it has data of.

        Raises:
            RuntimeError: pytesseract or tesseract is not installed, or lacks the language.
        """
        try:
            import pytesseract
        except ImportError as error:
            raise RuntimeError(
                f"text needs pytesseract ({error}): pip install 'llama-adapter-kernels[ocr]'"
            ) from error
        self._reader, self.language = pytesseract, language
        try:
            languages = pytesseract.get_languages(config="")
        except pytesseract.TesseractNotFoundError as error:
            raise RuntimeError(
                "text needs the program tesseract: apt install tesseract-ocr"
            ) from error
        if language not in languages:
            raise RuntimeError(
                f"language must be one of {', '.join(languages)}, got {language!r}: "
                f"apt install tesseract-ocr-{language}"
            )

    def __call__(self, image: Path) -> str | None:
        """ "1. first line 2. second line", or None where there is no text.

        Raises:
            ValueError: the file is no image, or one that tesseract refuses.
        """
        from PIL import Image

        try:
            with Image.open(image) as opened:
                pixels = opened.convert("RGB")
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(f"{image}: no image that can be read ({error})") from error
        try:
            text = self._reader.image_to_string(pixels, lang=self.language)
        except RuntimeError as error:
            told = " ".join(str(error).split())
            raise ValueError(f"{image}: no image that tesseract can read ({told})") from error
        lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
        return " ".join(f"{number}. {line}" for number, line in enumerate(lines, 1)) or None
