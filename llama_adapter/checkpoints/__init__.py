"""Base models and adapters on disk: `load_base` reads a base, adapter_file.py the adapter's file.

adapter_formats.py reads and writes adapters of other programs.

Every format has a file of its own with its key map as a table; callers see one `Base`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from llama_adapter.checkpoints.fingerprint import Fingerprint, fingerprint
from llama_adapter.checkpoints.hugging_face import is_hugging_face, read_hugging_face
from llama_adapter.checkpoints.litgpt import is_litgpt, read_litgpt
from llama_adapter.checkpoints.meta import is_meta, read_meta
from llama_adapter.checkpoints.quantize import check_format
from llama_adapter.checkpoints.quantize import quantize as quantize_weights
from llama_adapter.model import Llama
from llama_adapter.sharding import check_launched
from llama_adapter.tokenizer import Tokenizer
from llama_adapter.world import World

__all__ = ["Base", "load_base"]

# how a folder is recognised and read; litgpt keeps Hugging Face's config.json beside its own
READERS = (
    (is_meta, read_meta),
    (is_litgpt, read_litgpt),
    (is_hugging_face, read_hugging_face),
)


@dataclass(frozen=True)
class Base:
    """A loaded base model.

    Attributes:
        model: frozen, in evaluation mode.
        tokenizer: the model's own.
        name: the folder's name, for messages and fingerprints.
        fingerprint: of the weights as read, where they were quantised since; else None, and
            `fingerprint` takes it of the model.
    """

    model: Llama
    tokenizer: Tokenizer
    name: str
    fingerprint: Fingerprint | None = None


def default_device() -> str:
    """Where to compute when nobody says: the GPU, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def checked_device(device: str | torch.device) -> torch.device:
    """A device by its name.

    Raises:
        ValueError: it is neither the CPU nor a GPU of CUDA, or is not there.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {str(device)!r}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} is not available: torch {torch.__version__} sees no GPU")
    return found


def load_base(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
    shard: World | None = None,
) -> Base:
    """Read a base model from a folder in Meta's, Hugging Face's or litgpt's format.

    What is in the folder tells the format. A model with a sliding window has it as its context.

    Args:
        folder: holds consolidated.*.pth, params.json and tokenizer.model; or config.json,
            safetensors and tokenizer.model or tokenizer.json; or lit_model.pth,
            model_config.yaml and such a tokenizer.
        dtype: of the loaded weights, a floating one; None keeps the files' own.
        device: where the weights go; it must hold all of them as read, even to be quantised.
        quantize: "int8", "nf4", "fp8" or "int4", the format that the weights of the linear maps are
            brought into once they are read; None leaves them. All answer, and an adapter can be
            trained on all but int4.
        shard: the processes that share the weights out, each reading its own rows alone; None
            gives this one all of them. Such a base is trained on, and does not answer.

    Returns:
        The base, frozen and in evaluation mode.

    Raises:
        FileNotFoundError: the folder or a file in it does not exist.
        ValueError: the folder is of another kind, a file is damaged or does not fit the others,
            the device is not there, or the base cannot be quantised or sharded so.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be a torch.dtype, as torch.bfloat16, got {dtype!r}")
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"base model folder {folder} does not exist")
    read = next((read for fits, read in READERS if folder.is_dir() and fits(folder)), None)
    if read is None:
        raise ValueError(
            f"base model {folder} must be a folder in Meta's format (consolidated.00.pth, "
            "params.json, tokenizer.model), Hugging Face's (config.json, model.safetensors or "
            "its index) or litgpt's (lit_model.pth, model_config.yaml)"
        )
    checked_device(device)
    if shard is not None:
        check_launched()
        if quantize is not None:
            raise ValueError(
                f"quantize must be left out where the base is sharded, got {quantize!r}: such "
                "weights cannot be split over processes"
            )
    if quantize is not None:
        # before the weights are read: that takes minutes
        check_format(quantize, device)
    model, tokenizer = read(folder, dtype=dtype, device=device, world=shard)
    name = folder.resolve().name
    if quantize is None:
        return Base(model, tokenizer, name)
    # adapters know the base by its weights as read
    identity = fingerprint(model, name)
    quantize_weights(model, quantize)
    return Base(model, tokenizer, name, identity)
