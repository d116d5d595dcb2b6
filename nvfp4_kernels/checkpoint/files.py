"""Files written so that they survive: every byte counted, summed up and fsynced; safetensors tensor by tensor."""

import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3",
}  # fmt: skip


class Item(NamedTuple):
    """A tensor to be written; `make` gives it when its turn comes."""

    name: str
    dtype: "torch.dtype"
    shape: tuple[int, ...]
    make: "Callable[[], torch.Tensor]"

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def safetensors(items: Iterable[Item], metadata: dict[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, tensor by tensor: the library's own writer would hold all of them at once, and
    gives no chance to sum the bytes up on their way."""
    import torch

    items, header, at = list(items), {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for item in items:
        offsets = [at, at + item.bytes]
        name = NAMES[str(item.dtype).removeprefix("torch.")]
        header[item.name] = {"dtype": name, "shape": list(item.shape), "data_offsets": offsets}
        at += item.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    yield len(text).to_bytes(8, "little") + text
    for item in items:
        tensor = item.make().detach().to(item.dtype)
        yield memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def write(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, int]:
    """Returns {"bytes", "crc32"} of what was written."""
    size, crc = 0, 0
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
            size, crc = size + len(part), zlib.crc32(part, crc)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "crc32": crc}


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut, not only the files' bytes. Nothing on Windows, which opens no folder."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
