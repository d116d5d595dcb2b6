"""Snapshots of a run: a folder for each, whole or not there at all.

A snapshot is written into a hidden folder, every file and the folder are fsynced, then it is renamed into place: a
kill, a crash or a full disk leaves the snapshots before it as they were. A manifest with the size and CRC-32 of every
file tells a damaged snapshot from a whole one. Tensors are safetensors, all else JSON; nothing is ever unpickled.

    checkpoints/step_00000120/  model.safetensors  optimizer.safetensors ...  state.json  manifest.json (written last)
"""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nvfp4_kernels.checkpoint.files import Item, safetensors, sync_folder, write

if TYPE_CHECKING:
    import torch

FORMAT = 1
MANIFEST = "manifest.json"
UNFINISHED = ".writing-"


class SnapshotError(ValueError):
    """A snapshot that cannot be written or read; the message is one line that says what to do."""


@dataclass(frozen=True)
class Snapshot:
    path: Path
    step: int
    state: dict

    def tensors(self, name: str) -> "dict[str, torch.Tensor]":
        """The tensors of `name`.safetensors, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.path / f"{name}.safetensors")


def save(
    folder: Path,
    step: int,
    tensors: "Mapping[str, Mapping[str, torch.Tensor]]",
    state: dict,
    texts: Mapping[str, str] | None = None,
    keep: int = 2,
) -> Path:
    """Writes snapshot `step` below `folder`, then drops all but the newest `keep` and this one.

    tensors: file name without its ending -> named tensors; state: anything JSON holds; texts: further small files.
    Raises SnapshotError, with the earlier snapshots untouched and nothing half-written left, when the disk is full.
    """
    folder = Path(folder)
    final, part = folder / f"step_{step:08d}", folder / f"{UNFINISHED}{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        part.mkdir()
        files = {}
        for name, group in tensors.items():
            files[f"{name}.safetensors"] = write(part / f"{name}.safetensors", safetensors(_items(group)))
        for name, text in {**(texts or {}), "state.json": json.dumps(state, indent=1)}.items():
            files[name] = write(part / name, [text.encode()])
        manifest = {"format": FORMAT, "step": step, "files": files}
        write(part / MANIFEST, [json.dumps(manifest, indent=1).encode()])
        sync_folder(part)
        if final.exists():  # the same step again, after a resume
            shutil.rmtree(final)
        part.rename(final)
        sync_folder(folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError):
            raise SnapshotError(_explain(error, folder, tensors)) from error
        raise
    for path in _found(folder)[keep:]:
        if path != final:  # later ones may be damaged, and the run have been resumed without them
            shutil.rmtree(path, ignore_errors=True)
    return final


def newest(folder: Path) -> tuple[Snapshot | None, list[str]]:
    """The newest whole snapshot below `folder`, and a line for each newer one that is damaged."""
    damaged = []
    for path in _found(Path(folder)):
        try:
            return load(path), damaged
        except SnapshotError as error:
            damaged.append(str(error))
    return None, damaged


def load(path: Path) -> Snapshot:
    """The snapshot at `path`, every byte of it checked against its manifest. Raises SnapshotError for a damaged one."""
    path = Path(path)
    manifest = _json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise SnapshotError(
            f"checkpoint: {path} has format {manifest.get('format')}; allowed: {FORMAT} "
            "(do: read it with the version of this package that wrote it)"
        )
    for name, known in manifest["files"].items():
        size, crc = _measure(path / name)
        if size != known["bytes"]:
            what = "is missing" if size is None else f"is cut short or grown, {size} bytes of {known['bytes']}"
        elif crc != known["crc32"]:
            what = "is corrupt, its CRC-32 differs from the manifest's"
        else:
            continue
        raise SnapshotError(f"checkpoint: {path / name} {what}; do: delete {path} and resume from the one before it")
    return Snapshot(path, manifest["step"], _json(path / "state.json"))


def remove_unfinished(folder: Path) -> None:
    """Drops what a killed run was writing."""
    for path in Path(folder).glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """A small file, whole or not there: written aside, fsynced, renamed."""
    part = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        write(part, [text.encode()])
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SnapshotError(_explain(error, path.parent, {})) from error
        raise


def _found(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step_*") if p.is_dir()), reverse=True)


def _items(group: "Mapping[str, torch.Tensor]") -> list[Item]:
    return [Item(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in group.items()]


def _measure(path: Path) -> tuple[int | None, int]:
    try:
        size, crc = 0, 0
        with open(path, "rb") as file:
            while chunk := file.read(1 << 22):
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        return size, crc
    except FileNotFoundError:
        return None, 0


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise SnapshotError(f"checkpoint: {path} does not exist; do: name a folder with a whole snapshot") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise SnapshotError(
            f"checkpoint: {path} is corrupt, it is no JSON; do: delete {path.parent} and resume from the one before it"
        ) from None


def _explain(error: OSError, folder: Path, tensors: "Mapping[str, Mapping[str, torch.Tensor]]") -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
        size = f", a snapshot needs {needed / 1e6:.1f} MB" if needed else ""
        return (
            f"checkpoint: the disk of {folder} is full{size}; do: free some space, then --resume "
            "(earlier snapshots are whole)"
        )
    return f"checkpoint: {folder} cannot be written ({error.strerror}); do: check the path and its permissions"
