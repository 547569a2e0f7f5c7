"""Where what is made once is kept: a folder of the user's caches, or one that is named."""

import os
from pathlib import Path

# names the folder that all caches lie in
ENVIRONMENT = "LLAMA_ADAPTER_CACHE"


def cache_folder(name: str, option: str) -> Path:
    """The folder of one kind of thing unless another is named.

    Args:
        name: of the kind, "tokens" for instance.
        option: of the command line, that would name another folder; for the message.

    Raises:
        OSError: the user has no home.
    """
    root = os.environ.get(ENVIRONMENT)
    if root:
        return Path(root) / name
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    except RuntimeError:
        raise OSError(
            f"{name} cannot be cached where the user has no home: name a folder with {option}, "
            f"or with {ENVIRONMENT}"
        ) from None
    return Path(caches) / "llama-adapter" / name
