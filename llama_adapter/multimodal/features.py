"""Features of image files, computed once: the encoder is frozen, so they never change.

One file an image, named by the digest of its content, in a folder named by the encoder's: a SHA-256
of what follows, then float32. All of them may be deleted whenever nobody reads; one that is damaged
is made anew.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from llama_adapter.checkpoints.atomic import write_atomically

_NUMBER = np.dtype("<f4")
_SEAL = hashlib.sha256().digest_size


class Encoder(Protocol):
    """What makes features of image files, such as ClipFeatures."""

    width: int
    digest: str

    def pixels(self, images: Sequence[str | Path]) -> Tensor:
        """What `__call__` takes of image files."""
        ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features (B, width)."""
        ...


class FeatureCache:
    """Features of image files, of a folder or made now.

    Attributes:
        folder: of this encoder's features.
    """

    def __init__(self, folder: str | Path, encoder: Encoder, *, batch_size: int = 32) -> None:
        """Keep an encoder's features.

        Args:
            folder: of all encoders' features; made when something is kept.
            encoder: that makes what is missing.
            batch_size: images that it takes at a time.
        """
        self._encoder, self._batch = encoder, batch_size
        self.folder = Path(folder) / encoder.digest
        self._known: dict[str, str] = {}

    @property
    def known(self) -> str:
        """Digest of the content of all files that are known, in the order of their names."""
        digests = [digest for _, digest in sorted(self._known.items())]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def __call__(self, images: Sequence[str | Path], *, know: bool = False) -> Tensor:
        """Features (n, width) in float32 of image files, on the CPU.

        Args:
            images: the files.
            know: keep their content's digests in memory: it is not read again from then on, unless
                their features are lost.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file is no image, or has changed since it is known.
            OSError: the folder cannot be written.
        """
        digests = [self._known.get(str(image)) or _digest(Path(image)) for image in images]
        found = {digest: self._read(digest) for digest in dict.fromkeys(digests)}
        missing = {
            digest: image
            for digest, image in zip(digests, images, strict=True)
            if found[digest] is None
        }
        names = list(missing)
        for start in range(0, len(names), self._batch):
            some = names[start : start + self._batch]
            features = self._encoder(self._encoder.pixels([missing[one] for one in some]))
            for name in some:
                if _digest(Path(missing[name])) != name:
                    raise ValueError(f"{missing[name]}: was changed while it was in use")
            for name, row in zip(some, features.float().cpu(), strict=True):
                if not bool(row.isfinite().all()):
                    raise ValueError(f"{missing[name]}: its features must be finite numbers")
                self._write(name, row)
                found[name] = row
        if know:
            self._known.update(zip(map(str, images), digests, strict=True))
        rows = [row for digest in digests if (row := found[digest]) is not None]
        return torch.stack(rows) if rows else torch.empty(0, self._encoder.width)

    def _path(self, digest: str) -> Path:
        # folders of a million files are slow to list
        return self.folder / digest[:2] / f"{digest}.features"

    def _read(self, digest: str) -> Tensor | None:
        """A row that is there and whole."""
        try:
            content = self._path(digest).read_bytes()
        except OSError:
            return None
        sealed, row = content[:_SEAL], content[_SEAL:]
        if len(row) != _NUMBER.itemsize * self._encoder.width or sealed != _seal(row):
            return None
        return torch.from_numpy(np.frombuffer(row, _NUMBER).astype(np.float32))

    def _write(self, digest: str, row: Tensor) -> None:
        content = row.numpy().astype(_NUMBER).tobytes()
        path = self._path(digest)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, _seal(content) + content)
        except OSError as error:
            raise OSError(
                f"features cannot be cached in {self.folder} ({error.strerror or error}): name "
                "another folder with --feature-cache"
            ) from error


def _seal(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _digest(path: Path) -> str:
    """Of a file's content."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(parameters: Sequence[Tensor], *settings: object) -> str:
    """Of an encoder: its weights, and whatever else decides its features."""
    found = hashlib.sha256(repr(settings).encode())
    for parameter in parameters:
        found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]
