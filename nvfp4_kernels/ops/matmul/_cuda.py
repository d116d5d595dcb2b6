"""Rows of bf16 times a packed weight: up to 64 through csrc/matmul/cuda.cu, here: which kernel, how k is split. More go to
_cuda_sm90.py, or to _cuda_slabs.py, which serves all. Groups of rows, each with a weight of its own, in one launch."""

import itertools

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack, most_runs
from nvfp4_kernels.formats.packed import PackedNVFP4Tensor
from nvfp4_kernels.ops import _cuda
from nvfp4_kernels.ops.matmul import _cuda_launch, _cuda_slabs, _cuda_sm90
from nvfp4_kernels.ops.matmul._cuda_launch import ALL, Groups

TOKENS = (8, 16, 32, 64)  # csrc/matmul/cuda.cu has a kernel for each
STAGES = {8: 4, 16: 4, 32: 4, 64: 3}
ROWS, THREADS, STEP = 128, 128, 128
# As many as H200's 132 processors hold at once (cuda.cu); one number for all devices, so that all give the same bits.
BLOCKS = {8: 528, 16: 528, 32: 396, 64: 264}
LEAST_STEPS = 4  # of a split: fewer are over before the ring is full

COUNTERS = 2048, 512  # rows, and counters of each: csrc/matmul/splits.cuh
# The rows that are taken: each by launches that follow one another, on a stream of a device, outside graphs or in one.
_rows: dict[tuple, int] = {}
_next_row = itertools.count()


def refuses(a, b, bias: Tensor | None, out_dtype: torch.dtype, out: Tensor | None, accumulate: bool) -> str | None:
    if not isinstance(b, PackedNVFP4Tensor):
        return "the CUDA kernels multiply packed weights alone (PackedNVFP4Tensor.pack)"
    if not isinstance(a, Tensor) or a.dtype != torch.bfloat16:
        return "packed weights are multiplied by rows of bfloat16"
    return _cuda.refuses_device("matmul", a)


def kernel(tokens: int) -> int:
    """The tokens that the smallest kernel for so many serves."""
    return next(most for most in TOKENS if tokens <= most)


def shared_bytes(most: int) -> int:
    """Of the ring, in the kernel for `most` tokens: codes, scales and x of each stage."""
    return STAGES[most] * (ROWS * STEP // 2 + ROWS * STEP // 16 + most * STEP * 2)


def splits(most: int, tiles: int, length: int) -> int:
    """Parts of k: as many as fill the device, none shorter than LEAST_STEPS."""
    return max(1, min(BLOCKS[most] // tiles, length // STEP // LEAST_STEPS))


def slots(tokens: int, groups: int) -> tuple[int, int]:
    """(tokens of a slot, slots) that serve so many tokens in so many groups, of whose sizes the host knows nothing. A slot has
    room for twice a group's mean: few groups need a second, which takes the weight from the L2 cache once more."""
    most = kernel(min(_twice_the_mean(tokens, groups), tokens, TOKENS[-1]))
    return most, most_runs(tokens, groups, most)


def _twice_the_mean(tokens: int, groups: int) -> int:
    return 2 * -(-tokens // max(groups, 1))


def run(a: Tensor, w: PackedNVFP4Tensor, bias: Tensor | None, out: Tensor, accumulate: bool) -> Tensor:
    """out [tokens, rows] = a @ w.T + bias, added to what is there with `accumulate`."""
    if not out.numel():
        return out
    a, bias = _cuda_launch.lined_up(a), None if bias is None else bias.contiguous()
    if a.shape[0] > TOKENS[-1]:
        many = _cuda_slabs if _cuda_sm90.refuses(a.shape[0], a) else _cuda_sm90
        return many.run(a, w, bias, out, accumulate)
    w = Stack(w.codes, w.scales, w.global_scale)
    return _launch(a, w, bias, out, accumulate, kernel(a.shape[0]), 1)


def run_groups(a: Tensor, w: Stack, groups: Groups, out: Tensor, relu2: bool = False) -> Tensor:
    """out [tokens, rows] = a @ w[group].T for each group of tokens, w packed; relu2: with negative values as 0, and squared."""
    if not out.numel():
        return out
    tokens, count = len(out), len(groups.offsets) - 1
    if _twice_the_mean(tokens, count) > TOKENS[-1] and not _cuda.refuses_arch(_cuda_sm90.ARCH, a):
        return _cuda_sm90.run_groups(a, w, groups, out, relu2)
    most, count = slots(tokens, count)
    return _launch(_cuda_launch.lined_up(a), w, None, out, False, most, count, groups, relu2)


def _launch(a, w: Stack, bias, out, accumulate, most: int, count: int, groups: Groups = ALL, relu2=False) -> Tensor:
    """With `count` slots of `most` tokens. w: a matrix, or with groups a stack of them."""
    tiles, length = -(-out.shape[1] // ROWS), w.values.shape[-3] * 64
    parts = splits(most, count * tiles, length)
    partial = counters = None
    if parts > 1:
        partial = torch.empty(count * tiles * parts * ROWS * most, dtype=torch.float32, device=a.device)
        counters = zeros(count * tiles, a.device)
    parameters = _cuda_launch.weight_only(a, w, bias, out, accumulate, parts, partial, counters, groups, relu2)
    _cuda.launch("matmul", f"weight_only_{most}", (count, parts, tiles), THREADS, shared_bytes(most), parameters, a)
    return out


def zeros(count: int, device: torch.device) -> Tensor | int:
    """Counters for a launch that leaves them at zero: their address, or a tensor where no row is left."""
    rows, counters = COUNTERS
    if device.type == "cuda" and count <= counters:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            graph = _cuda.recording(stream) if torch.cuda.is_current_stream_capturing() else None
        key = device, stream, graph  # a graph may replay beside anything else
        row = _rows[key] if key in _rows else _rows.setdefault(key, next(_next_row))
        if row < rows:
            return _cuda.variable("matmul", "nvfp4_counters", device) + 4 * counters * row
    return torch.zeros(count, dtype=torch.int32, device=device)
