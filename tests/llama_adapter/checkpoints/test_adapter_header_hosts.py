"""Is what a header says of a host and its head refused where no host can have it?"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_adapter.adapter import Adapter
from llama_adapter.checkpoints.adapter_file import read_adapter
from llama_adapter.checkpoints.adapter_header import from_json, to_json
from llama_adapter.config import AdapterConfig, HeadConfig, HostConfig, LlamaConfig
from llama_adapter.hosts import adapt
from tests.llama_adapter.encoder_models import bert

KNOWN: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda host: host.update(kind="a\nb"), r"host kind must be a name .* got 'a\\nb'"),
    (lambda host: host.update(kind="llama"), "must have no head and no shifted positions for a ll"),
    (lambda host: host["head"].update(labels=["one"]), "a label for each of its .5. outputs"),
    (lambda host: host["head"].update(shapes={"a..b": [5]}), "dotted names, got 'a..b'"),
    (lambda host: host["head"].update(shapes={"": [5]}), "dotted names, got ''"),
]


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The header of an adapter with the head of a classifier."""
    folder: Path = tmp_path_factory.mktemp("adapter")
    model = bert("SequenceClassification")
    adapt(model)
    model.save_pretrained(folder)
    return to_json(read_adapter(folder / "adapter.safetensors")[0])


@pytest.mark.parametrize(("change", "message"), KNOWN)
def test_a_host_that_cannot_be_is_refused(
    header: dict[str, Any], change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    changed = json.loads(json.dumps(header))
    assert from_json(changed, "file").host.head is not None
    change(changed["host"])
    with pytest.raises(ValueError, match=f"^file: .*{message}"):
        from_json(changed, "file")


@pytest.mark.parametrize("name", ["training", "forward", "_parameters", "weight.x"])
def test_names_that_no_parameter_can_have_are_refused(name: str) -> None:
    shape = LlamaConfig(dim=48, n_layers=3, n_heads=3, vocab_size=9)
    head = HeadConfig("classifier", ("a", "b"), {"weight": (2, 48), name: (2,)})
    with pytest.raises(
        ValueError, match=f"head shapes must be by names of parameters, got '{name}"
    ):
        Adapter(AdapterConfig(), shape, host=HostConfig("bert", head))
