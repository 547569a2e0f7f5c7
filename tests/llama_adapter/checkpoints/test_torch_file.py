"""Is a torch file opened without running anything, and every other file refused in one line?"""

import argparse
import zipfile
from pathlib import Path

import pytest
import torch

from llama_adapter.checkpoints.torch_file import open_torch


@pytest.mark.parametrize("archive", [True, False])
def test_tensors_and_plain_values_come_back(archive: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    content = {"model": {"x": torch.randn(3, 5)}, "epoch": 4}
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    opened = open_torch(path)
    assert opened["epoch"] == 4
    assert torch.equal(opened["model"]["x"], content["model"]["x"])


def test_a_file_that_needs_code_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-4.pth"
    torch.save({"model": {}, "args": argparse.Namespace(epochs=5)}, path)
    message = r"checkpoint-4\.pth can only be read by running code \(argparse\.Namespace\), which"
    with pytest.raises(ValueError, match=message):
        open_torch(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04 and no more", r"is cut off \(16 bytes\): copy it again"),
        (b"", "is damaged or not a torch file"),
        (b"hello", "is damaged or not a torch file"),
    ],
)
def test_other_files_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_torch(path)


def test_only_a_dictionary_will_do(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(torch.ones(2), path)
    with pytest.raises(ValueError, match="must hold tensors by name, got Tensor"):
        open_torch(path)


def test_a_record_shorter_than_its_tensor_is_found(tmp_path: Path) -> None:
    """The loader maps the bytes that follow it, another tensor's, and says nothing."""
    whole, path = tmp_path / "whole.pth", tmp_path / "cut.pth"
    torch.save({"x": torch.randn(64), "y": torch.randn(64), "again": {}}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
        for record in source.infolist():
            content = source.read(record)
            cut = record.filename.endswith("/data/0")
            target.writestr(record.filename, content[:100] if cut else content)
    with pytest.raises(ValueError, match="is damaged: its tensors lie in records of other sizes"):
        open_torch(path)


def test_an_archive_of_another_program_is_refused(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.pth", tmp_path / "packed.pth"
    torch.save({"x": torch.zeros(640)}, whole)
    packed = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(whole) as source, packed as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    with pytest.raises(ValueError, match=r"is an archive, but not one that torch\.save wrote"):
        open_torch(path)


def test_views_of_one_storage_and_values_that_hold_themselves_are_read(tmp_path: Path) -> None:
    path, x = tmp_path / "a.pth", torch.randn(6)
    loop: list[object] = [x]
    loop.append(loop)
    torch.save({"x": x[2:], "y": x.view(2, 3), "empty": torch.ones(0), "loop": loop}, path)
    opened = open_torch(path)
    assert torch.equal(opened["x"], x[2:])
