"""What a tensor map says of a matrix, in the form in which ops/_tensor_map.py packs it when no driver encodes it."""

from dataclasses import dataclass

import numpy as np

from nvfp4_kernels.ops import _tensor_map
from tests.machine.memory import Fault


@dataclass(frozen=True)
class TensorMap:
    """Of bytes, rows `pitch` apart, in boxes of 128 bytes under the swizzle so named (PTX ISA, "Tensor Swizzling Modes")."""

    base: int
    width: int
    rows: int
    pitch: int
    box_width: int
    box_rows: int

    def check(self, target: int) -> None:
        """What cuTensorMapEncodeTiled and cp.async.bulk.tensor ask for."""
        if self.base % 16 or self.pitch % 16 or not 0 < self.box_rows <= 256 or self.box_width != 128:
            raise Fault(f"not a tensor map: {self}")
        if target % 128:
            raise Fault("a box at no multiple of 128")

    @staticmethod
    def swizzled(addresses: np.ndarray) -> np.ndarray:
        """Chunks of 16 bytes change places among eight by the number of their 128 bytes, modulo 8, in shared memory."""
        return addresses ^ (addresses >> 7 & 7) << 4

    def box(self, memory, left: int, top: int) -> np.ndarray:
        content = np.zeros((self.box_rows, self.box_width), np.uint8)
        rows, columns = np.arange(top, top + self.box_rows), np.arange(left, left + self.box_width)
        there = ((rows >= 0) & (rows < self.rows))[:, None] & ((columns >= 0) & (columns < self.width))
        at = np.uint64(self.base) + (rows[:, None] * self.pitch + columns)[there].astype(np.uint64)
        content[there] = memory.load(at, 1)
        return content


def decoded(machine, address) -> TensorMap:
    """The map at a generic address, in the launch's parameters or in global memory."""
    if int(address) % 64:
        raise Fault("a tensor map at no multiple of 64")
    steps = np.arange(0, _tensor_map.BYTES, dtype=np.uint64)
    content = machine.memory.load(np.uint64(address) + steps, 1).tobytes()
    return TensorMap(*_tensor_map.MODEL.unpack_from(content))
