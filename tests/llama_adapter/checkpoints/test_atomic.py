"""Is a file after any failure, a kill among them, either the old one or the new one?"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_adapter.checkpoints import atomic
from llama_adapter.checkpoints.atomic import write_atomically


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    for data in (b"", b"first", bytes(range(256)) * 999):
        write_atomically(path, data)
        assert path.read_bytes() == data
        assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_a_new_file_is_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"x")
    write_atomically(tmp_path / "atomic", b"x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fail(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(atomic.os, call, fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_data_and_then_the_name_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    fsync, replace = os.fsync, os.replace

    def log_fsync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "data")
        fsync(descriptor)

    def log_replace(source: Path, target: Path) -> None:
        events.append("rename")
        assert source.parent == target.parent
        assert source.name.endswith(".tmp")
        replace(source, target)

    monkeypatch.setattr(atomic.os, "fsync", log_fsync)
    monkeypatch.setattr(atomic.os, "replace", log_replace)
    write_atomically(tmp_path / "file.bin", b"new")
    assert events == ["data", "rename", "folder"]


@pytest.mark.parametrize(
    "name", ["x" * 255, "\N{GREEK SMALL LETTER ALPHA}" * 127, "\N{GRINNING FACE}" * 63]
)
def test_a_name_may_be_as_long_as_the_file_system_takes(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match=f"cannot write .*{'x' * 256}: File name too long"):
        write_atomically(tmp_path / ("x" * 256), b"new")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder .*absent does not exist: cannot write a"):
        write_atomically(tmp_path / "absent" / "a.bin", b"new")


WRITER = """
import runpy, sys
write = runpy.run_path(sys.argv[1])["write_atomically"]
print("ready", flush=True)
while True:
    for letter in b"abcdefgh":
        write(sys.argv[2], bytes([letter]) * 300_007)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    write_atomically(path, b"a" * 300_007)
    for attempt in range(8):
        command = [sys.executable, "-c", WRITER, atomic.__file__, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.011 * attempt)
            process.kill()
        data = path.read_bytes()
        assert len(data) == 300_007
        assert data == data[:1] * 300_007
