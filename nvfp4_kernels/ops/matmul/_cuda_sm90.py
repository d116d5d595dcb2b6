"""65 to 1,024 rows times a packed weight on Hopper through csrc/matmul/sm90.cuh: which tile, how many blocks share the work.
And groups of more than 32 rows on average."""

import functools

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack, most_runs
from nvfp4_kernels.formats.packed import PackedNVFP4Tensor
from nvfp4_kernels.ops import _cuda
from nvfp4_kernels.ops.matmul import _cuda_launch
from nvfp4_kernels.ops.matmul._cuda_launch import Groups

ARCH = "90a"
# Beyond it decoding to memory costs less than a fused kernel loses to cuBLAS: 1.23 of its time at 1,024 rows, less above.
MOST = 1024
TOKENS, STEP, THREADS, STAGES = 128, 128, 256, 4  # csrc/matmul/sm90.cuh
PROCESSORS = 132  # H200's; one number for all devices, so that all give the same bits
LEAST_STEPS = 4  # of a block: fewer are over before the ring is full
# What a step costs with tiles of so many rows, for which 1 is the tensor cores' time for 128. The smaller tile loads each token
# for half as many rows: 42 KB in 1,024 clocks instead of 50 KB in 2,048.
COST = {128: 1.25, 256: 2.0}
UNEVEN = 1.1  # more blocks than tiles leave partial sums: not for a gain of less than this


def refuses(tokens: int, x: Tensor) -> str | None:
    if not 0 < tokens <= MOST:
        return f"the kernel for {ARCH} multiplies packed weights by 1 to {MOST} rows"
    return _cuda.refuses_arch(ARCH, x)


def shared_bytes(tile: int) -> int:
    """Of the ring, x, codes and scales of each stage, and what brings it to a multiple of 1,024 bytes."""
    return STAGES * (TOKENS * STEP * 2 + tile * STEP // 2 + tile * STEP // 16) + 1024


def _blocks(tiles: int, steps: int) -> tuple[int, int]:
    """(blocks, rounds of steps until the last is done) for so many tiles of so many steps each."""

    def rounds(blocks: int) -> int:
        return -(-blocks // PROCESSORS) * -(-tiles * steps // blocks)

    even = tiles * max(1, min(PROCESSORS // tiles, steps // LEAST_STEPS))  # all tiles in parts alike, or whole
    shared = min(PROCESSORS, max(1, tiles * steps // LEAST_STEPS))
    blocks = shared if rounds(even) > UNEVEN * rounds(shared) else even
    return blocks, rounds(blocks)


@functools.lru_cache(1024)
def plan(tokens: int, rows: int, length: int) -> tuple[int, int, int]:
    """(rows of a tile, tiles, blocks). A pure function of rows, length and the number of token tiles: so are a row's bits."""
    found = []
    for tile, cost in COST.items():
        tiles = -(-rows // tile) * -(-tokens // TOKENS)
        blocks, rounds = _blocks(tiles, length // STEP)
        found.append((cost * rounds, tile, tiles, blocks))
    return min(found)[1:]


def run(a: Tensor, w: PackedNVFP4Tensor, bias: Tensor | None, out: Tensor, accumulate: bool) -> Tensor:
    """out [tokens, rows] = a @ w.T + bias, added to what is there with `accumulate`; `a` lined up."""
    if out.data_ptr() % 16:  # the kernel writes 16 bytes at once
        aligned = out.clone()
        return out.copy_(run(a, w, bias, aligned, accumulate))
    steps = w.codes.shape[1] // 2
    tile, tiles, blocks = plan(a.shape[0], w.codes.shape[0] * 16, steps * STEP)
    whole = tiles == blocks  # each block has a tile
    partial = None if whole else torch.empty(2 * blocks * tile * TOKENS, dtype=torch.float32, device=a.device)
    weight = Stack(w.codes, w.scales, w.global_scale)
    parameters = _cuda_launch.weight_only(a, weight, bias, out, accumulate, blocks, partial)
    launch = functools.partial(_cuda.launch, "matmul", threads=THREADS, parameters=parameters, x=a)
    launch(f"weight_only_tiles_{tile}", (blocks,), shared=shared_bytes(tile))
    if not whole:
        launch(f"weight_only_parts_{tile}", (tiles, tile // 16), shared=0)
    return out


def run_groups(a: Tensor, w: Stack, groups: Groups, out: Tensor, relu2: bool) -> Tensor:
    """As _cuda.run_groups, for large groups: a block for each tile, whole, however many rows of a tile a group needs."""
    tokens, rows = out.shape
    a = _cuda_launch.lined_up(a)
    tile = min(COST, key=lambda tile: -(-rows // tile) * COST[tile])
    tiles, count = -(-rows // tile), most_runs(tokens, len(groups.offsets) - 1, TOKENS)
    parameters = _cuda_launch.weight_only(a, w, None, out, False, tiles, None, None, groups, relu2)
    _cuda.launch("matmul", f"weight_only_tiles_{tile}", (count * tiles,), THREADS, shared_bytes(tile), parameters, a)
    return out
