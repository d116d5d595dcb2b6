"""Snapshots are whole or absent: round trip, atomicity under errors, damage found, pruning."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nvfp4_kernels.checkpoint import files, snapshot

TENSORS = {"model": {
    "w": torch.randn(3, 5), "half": torch.randn(4).bfloat16(), "noise": torch.tensor([2**40, -1]),
    "step": torch.tensor(3.0), "none": torch.zeros(0, 4), "turned": torch.randn(4, 3).t(),
    "flag": torch.tensor([True, False]),
    "fp8": torch.randn(8).to(torch.float8_e4m3fn),
}, "rng": {"torch": torch.get_rng_state()}}  # fmt: skip


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_round_trip_is_bitwise_and_plain_safetensors(tmp_path):
    state = {"loss": 0.1 + 0.2, "big": 2**60, "list": [1, None]}
    path = snapshot.save(tmp_path, 12, TENSORS, state, texts={"config.json": "{}"})
    got, damaged = snapshot.newest(tmp_path)
    assert got.step == 12 and got.path == path and got.state == state and damaged == []
    for name, group in TENSORS.items():
        read = load_file(path / f"{name}.safetensors")  # the library's own reader
        assert read.keys() == group.keys() == got.tensors(name).keys()
        for key, tensor in group.items():
            assert read[key].dtype == tensor.dtype and read[key].shape == tensor.shape
            assert (
                read[key]
                .contiguous()
                .reshape(-1)
                .view(torch.uint8)
                .equal(tensor.contiguous().reshape(-1).view(torch.uint8))
            )
    assert (path / "config.json").read_text() == "{}"
    assert not [f for f in tree(tmp_path) if f.endswith((".pt", ".pkl", ".bin"))]


def test_keeps_the_newest_and_removes_what_a_kill_left(tmp_path):
    (tmp_path / f"{snapshot.UNFINISHED}00000001").mkdir(parents=True)
    for step in (1, 2, 10, 9):
        snapshot.save(tmp_path, step, TENSORS, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000009", "step_00000010"]
    assert snapshot.newest(tmp_path)[0].step == 10
    snapshot.save(tmp_path, 10, TENSORS, {"again": 1})
    assert snapshot.newest(tmp_path)[0].state == {"again": 1}


def test_what_was_just_written_stays_below_a_damaged_later_one(tmp_path):
    damaged = snapshot.save(tmp_path, 20, TENSORS, {})
    truncate(damaged / "model.safetensors")
    for step in (11, 12):
        snapshot.save(tmp_path, step, TENSORS, {}, keep=1)
        assert snapshot.newest(tmp_path)[0].step == step
    assert len(list(tmp_path.iterdir())) == 2


def test_no_snapshot(tmp_path):
    assert snapshot.newest(tmp_path / "nothing") == (None, [])
    with pytest.raises(snapshot.SnapshotError, match="does not exist; do: "):
        snapshot.load(tmp_path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name, damage, message", [
    ("model.safetensors", truncate, "cut short"), ("model.safetensors", flip, "corrupt"),
    ("model.safetensors", Path.unlink, "is missing"), ("rng.safetensors", flip, "corrupt"),
    ("state.json", truncate, "cut short"), ("manifest.json", truncate, "no JSON"),
    ("manifest.json", Path.unlink, "exist"),
])  # fmt: skip
def test_damage_is_found_and_the_one_before_is_used(tmp_path, name, damage, message):
    snapshot.save(tmp_path, 1, TENSORS, {"n": 1})
    path = snapshot.save(tmp_path, 2, TENSORS, {"n": 2})
    damage(path / name)
    with pytest.raises(snapshot.SnapshotError, match=message) as caught:
        snapshot.load(path)
    assert "\n" not in str(caught.value) and "do: " in str(caught.value)
    got, damaged = snapshot.newest(tmp_path)
    assert got.step == 1 and got.state == {"n": 1} and len(damaged) == 1


def test_other_format_is_named(tmp_path):
    path = snapshot.save(tmp_path, 1, TENSORS, {})
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 9}))
    with pytest.raises(snapshot.SnapshotError, match="has format 9; allowed: 1"):
        snapshot.load(path)


@pytest.mark.parametrize("call", range(1, 6))
def test_full_disk_leaves_the_previous_one_and_no_part(tmp_path, monkeypatch, call):
    """Every fsync of a save in turn fails as a full disk fails: late, on flush."""
    snapshot.save(tmp_path, 1, TENSORS, {"n": 1})
    before, real, calls = tree(tmp_path), os.fsync, iter(range(1, 99))

    def full(handle):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(snapshot.SnapshotError, match=r"disk of .* is full, a snapshot needs .* do: free") as caught:
        snapshot.save(tmp_path, 2, TENSORS, {})
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


FULL = """
import sys, torch
from pathlib import Path
from nvfp4_kernels.checkpoint import snapshot
folder = Path(sys.argv[1])
snapshot.save(folder, 1, {"model": {"w": torch.zeros(1000)}}, {})
try:
    snapshot.save(folder, 2, {"model": {"w": torch.zeros(10_000_000)}}, {})
except snapshot.SnapshotError as error:
    print(error)
print(sorted(p.name for p in folder.iterdir()), snapshot.newest(folder)[0].step)
"""


def test_a_disk_that_is_really_full(tmp_path):
    """A 1 MB file system in a mount namespace of its own; skipped where the machine allows none."""
    mount = f'mount -t tmpfs -o size=1m none {tmp_path} && exec "$0" -c "$1" {tmp_path}'
    got = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", mount, sys.executable, FULL],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if got.returncode and "Error" not in got.stderr:
        pytest.skip("no unprivileged mount namespace here")
    assert "is full, a snapshot needs 40.0 MB" in got.stdout
    assert got.stdout.endswith("['step_00000001'] 1\n")


def test_unwritable_folder_and_interrupt(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(snapshot.SnapshotError, match="cannot be written"):
        snapshot.save(tmp_path / "file", 1, TENSORS, {})

    def interrupt(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        snapshot.save(tmp_path / "run", 1, TENSORS, {})
    assert list((tmp_path / "run").iterdir()) == []


def test_write_text_is_atomic(tmp_path, monkeypatch):
    snapshot.write_text(tmp_path / "run.json", "one")

    def full(handle):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(snapshot.SnapshotError, match="is full"):
        snapshot.write_text(tmp_path / "run.json", "two")
    assert tree(tmp_path) == {"run.json": b"one"}


def test_windows_opens_no_folder(tmp_path, monkeypatch):
    opened = os.open

    def without_folders(path, *flags, **options):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *flags, **options)

    monkeypatch.setattr(os, "open", without_folders)
    with pytest.raises(PermissionError):
        files.sync_folder(tmp_path)
    monkeypatch.setattr(sys, "platform", "win32")
    files.sync_folder(tmp_path)
