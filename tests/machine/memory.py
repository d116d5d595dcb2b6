"""What addresses mean: global memory is the process's own, tensor by tensor; the other spaces are arrays.

Every access must lie inside of one allocation and at a multiple of its size, as on a GPU; anything else is a Fault.
"""

import ctypes
import gc

import numpy as np
import torch

# Where generic addresses of the other spaces begin: no process has memory there.
SHARED_WINDOW, PARAMETER_WINDOW, CONSTANT_WINDOW = 1 << 60, 1 << 61, 1 << 62
REMOTE = 24  # from this bit on, an address of another block's shared memory: its rank in the cluster, plus 1
POISON = 0xFF  # of shared memory that nobody has written: NaN in every format
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Fault(Exception):
    """What would be an illegal access, or undefined, on a GPU."""


class Region:
    """Some contiguous bytes that may be accessed."""

    def __init__(self, base: int, content: np.ndarray, name: str, writable: bool = True):
        self.base, self.size, self.name, self.writable = base, content.size, name, writable
        self.views = {w: content[: content.size // w * w].view(word) for w, word in WORDS.items()}


def extent(tensor) -> tuple[int, int]:
    """(address, bytes) of what a tensor's values lie in."""
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (NotImplementedError, RuntimeError):  # wrappers have none
        return 0, 0


def tensors_at(parameters: bytes):
    """Those that a word of the parameters points to, of all there are."""
    words = np.frombuffer(parameters[: len(parameters) // 8 * 8], np.uint64)
    for tensor in tensors_of_the_process():
        base, size = extent(tensor)
        if ((words >= base) & (words < base + size)).any():
            yield tensor


def tensors_of_the_process():
    kinds = {}
    for thing in gc.get_objects():
        kind = type(thing)
        if kind not in kinds:
            kinds[kind] = issubclass(kind, torch.Tensor)
        if kinds[kind] and thing.device.type == "cpu" and thing.layout == torch.strided:
            yield thing


class Memory:
    """What a launch may touch: tensors, its parameters and constants."""

    def __init__(self, tensors, parameters: bytes, constants: bytes):
        found = {}
        for tensor in tensors:
            base, size = extent(tensor)
            if base and size and base not in found:
                content = np.frombuffer((ctypes.c_uint8 * size).from_address(base), np.uint8)
                found[base] = Region(base, content, f"{size} bytes of a tensor")
        for base, content, name in (
            (PARAMETER_WINDOW, parameters, "the parameters"),
            (CONSTANT_WINDOW, constants, "the constants"),
        ):
            if content:
                padded = np.frombuffer(content.ljust(-(-len(content) // 16) * 16, b"\0"), np.uint8).copy()
                found[base] = Region(base, padded, name, writable=False)
        self.regions = [found[base] for base in sorted(found)]
        self.bases = np.array([region.base for region in self.regions], np.uint64)

    def places(self, addresses: np.ndarray, width: int):
        """(region, which of the addresses lie in it, their index as words of `width` bytes), region by region."""
        if not addresses.size:
            return
        if (addresses % np.uint64(width)).any():
            raise Fault(f"an address that is no multiple of {width}")
        which = np.searchsorted(self.bases, addresses, "right").astype(np.int64) - 1
        for i in [which[0]] if (which == which[0]).all() else np.unique(which):
            region = self.regions[i] if i >= 0 else None
            mine = which == i
            offsets = addresses[mine] - np.uint64(region.base if region else 0)
            if region is None or int(offsets.max()) + width > region.size:
                far = int(addresses[mine].max())
                near = f"beyond {region.name} at {region.base:#x}" if region else "below everything"
                raise Fault(f"address {far:#x} of {width} bytes: {near}")
            yield region, mine, (offsets // np.uint64(width)).astype(np.int64)

    def load(self, addresses: np.ndarray, width: int) -> np.ndarray:
        out = np.empty(addresses.shape, WORDS[width])
        for region, mine, index in self.places(addresses, width):
            out[mine] = region.views[width][index]
        return out

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        width = values.dtype.itemsize
        for region, mine, index in self.places(addresses, width):
            if not region.writable:
                raise Fault(f"a store to {region.name}")
            view, mine = region.views[width], values[mine]
            view[index] = mine
            if (view[index] != mine).any():
                raise Fault(f"a place in {region.name} that threads write different values to at once")


class Shared:
    """The shared memory of all blocks, one row each."""

    def __init__(self, blocks: int, size: int, cluster: int):
        self.size, self.cluster = -(-size // 16) * 16, cluster
        self.content = np.full(blocks * self.size, POISON, np.uint8)
        self.views = {w: self.content.view(word) for w, word in WORDS.items()}
        self.races = None
        # what threads have stored and no fence has shown to the asynchronous units
        self.unshown = np.zeros(blocks * self.size, np.uint8)
        self.unshown_views = {w: self.unshown.view(word) for w, word in WORDS.items()}

    def index(self, blocks: np.ndarray, addresses: np.ndarray, width: int) -> np.ndarray:
        """Of words of `width` bytes: `blocks` has the block that each access comes from."""
        addresses = addresses.astype(np.int64)
        remote = addresses >> REMOTE
        offset = addresses & (1 << REMOTE) - 1
        block = np.where(remote > 0, blocks // self.cluster * self.cluster + remote - 1, blocks)
        if offset.size and (int(offset.max()) + width > self.size or (offset % width).any()):
            raise Fault(f"shared address {int(offset.max()):#x} of {width} bytes in {self.size}")
        if remote.size and int(remote.max()) > self.cluster:
            raise Fault(f"a block of rank {int(remote.max()) - 1} in a cluster of {self.cluster}")
        return (block * self.size + offset) // width

    def load(self, blocks, addresses, width, lanes=None):
        """What lies there; of accesses by lanes hazards are found, except of another block's memory."""
        self.reads(blocks, addresses, width, lanes)
        return self.views[width][self.index(blocks, addresses, width)]

    def store(self, blocks, addresses, values, lanes=None):
        width = values.dtype.itemsize
        index, view = self.index(blocks, addresses, width), self.views[width]
        if self.followed(addresses, lanes):
            lanes = np.broadcast_to(lanes, index.shape).ravel()
            self.races.write(index.ravel() * width, width, lanes, (view[index] != values).ravel())
        view[index] = values
        self.unshown_views[width][index] = 1
        if (view[index] != values).any():
            raise Fault("a place in shared memory that threads write different values to at once")

    def reads(self, blocks, addresses, width, lanes, together=False):
        """These lanes read there, or all of their warps together."""
        if self.followed(addresses, lanes):
            at = self.index(blocks, addresses, width) * width
            self.races.read(at.ravel(), width, np.broadcast_to(lanes, at.shape).ravel(), together)

    def will_be_written(self, blocks, addresses, width, lanes):
        """Something asynchronous may write there for these lanes from now on."""
        if self.followed(addresses, lanes):
            at = self.index(blocks, addresses, width) * width
            self.races.write(at, width, np.broadcast_to(lanes, at.shape), lasting=False)

    def change(self, blocks, addresses, width, lanes):
        """Lanes are to load, or to store, as atomic instructions do."""
        if self.followed(addresses, lanes):
            self.races.change(self.index(blocks, addresses, width) * width, width, lanes)

    def followed(self, addresses, lanes):
        return self.races is not None and lanes is not None and not (addresses >> addresses.dtype.type(REMOTE)).any()

    def show(self, blocks) -> None:
        """To the asynchronous units, all that is in these blocks' memory."""
        self.unshown.reshape(-1, self.size)[blocks] = 0

    def hidden(self, blocks, addresses, width) -> bool:
        """Whether anything there has not been shown."""
        return bool(self.unshown_views[width][self.index(blocks, addresses, width)].any())
