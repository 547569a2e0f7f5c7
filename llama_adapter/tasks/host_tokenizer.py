"""The tokenizer of a host, from the folder that transformers saved it in."""

from pathlib import Path
from typing import Any

from llama_adapter.quiet import quiet

# without one of these transformers makes a tokenizer that knows no word
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
# and beside them what a text's tokens depend on
FILES = (*VOCABULARIES, "merges.txt", "tokenizer_config.json")
_REMEDY = "hosts need transformers: pip install 'llama-adapter-kernels[hf]'"


def import_transformers() -> Any:
    """The package transformers.

    Raises:
        ImportError: it is missing; the message says what installs it.
    """
    try:
        with quiet():
            import transformers
    except ImportError as error:
        raise ImportError(f"{_REMEDY} ({error})") from None
    return transformers


def load_tokenizer(folder: str | Path, words: bool = False) -> Any:
    """The tokenizer of a host.

    Args:
        folder: of the host.
        words: whether it is given words one by one, which are what they are in a text; otherwise
            texts are what the folder's own tokenizer makes of them.

    Raises:
        FileNotFoundError: there is no such folder.
        ImportError: transformers is missing.
        ValueError: the folder holds none that can be read, or a slow one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"model {folder} must be a folder that transformers saved, there is none: names of a "
            "hub are not downloaded"
        )
    transformers = import_transformers()
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise ValueError(f"{folder} holds no tokenizer: none of {', '.join(VOCABULARIES)}")
    try:
        with quiet():
            found = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, **({"add_prefix_space": True} if words else {})
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())[:160]
        raise ValueError(f"{folder} holds no tokenizer that can be read ({said})") from error
    if not found.is_fast:
        raise ValueError(f"{folder} must hold a fast tokenizer (tokenizer.json), got a slow one")
    return found
