"""One call of the scan as its Triton kernels take it: shapes, strides, tiles, and the choice between segments and sequences."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nvfp4_kernels.ops import _device, _tuned
from nvfp4_kernels.ops._triton import next_power_of_2
from nvfp4_kernels.ops._triton_numerics import by_registers
from nvfp4_kernels.ops.selective_scan._triton_plan import SEGMENT, Plan, plan

CHANNELS, STATES = 128, 256  # the largest head_dim and state size


@dataclass(frozen=True)
class Tile:
    """block: tokens of a matrix product; channels, columns: of a state held at once; stages: of loads in flight, by kernel.

    Of the backward pass: width: columns of dB or dC that a program sums; together: one launch for all that blocks need;
    every: blocks of which one has the state it enters in memory, and the others make theirs from it.
    """

    block: int
    channels: int
    columns: int
    warps: int
    forward: int
    states: int = 3
    backward: int = 2
    width: int = 64
    together: bool = False
    every: int = 1

    def pieces(self, head_dim: int) -> int:
        """Programs, or turns, that a head takes."""
        return -(-head_dim // self.channels)

    def slices(self, state: int) -> int:
        """Programs that the columns of dB, or of dC, are divided among."""
        return -(-state // self.width)


# Of a tile: loads in flight alone; whatever else it has decides where sums are rounded.
CHANGES = ({}, {"forward": 3}, {"backward": 3}, {"states": 2}, {"forward": 2})


def tile(dtype: torch.dtype, head_dim: int, state: int, instruction: str, alone: bool) -> Tile:
    """instruction: as in _device.matrix_instruction. alone: the forward pass has at most one program a multiprocessor."""
    columns = max(16, next_power_of_2(state))
    # The operands of a block and a state of 64 channels x 128 columns in 16 bits take 16 KB each, and that state in fp32 64
    # registers of 4 warps' threads. Twice or four times as long columns get blocks and states of a half or a quarter; so does
    # fp32, of which three TF32 products hold each operand twice.
    wide = 2 * dtype.itemsize if dtype.itemsize == 4 else dtype.itemsize
    share = min(4, max(1, columns * wide // 256))
    block, channels = 64 // share, min(max(16, next_power_of_2(head_dim)), 64 // share)
    # 64 tokens and 4 warps are one wgmma or tcgen05 product; two such programs fit a multiprocessor with two stages (90 to 108
    # KB each), so that one works while the other waits for its loads; a program alone waits less with three (133 to 142 KB).
    if instruction != "mma.sync" and block == 64:
        # The backward pass in one launch reads x and dy from memory once; with tcgen05 that spills a few registers.
        return Tile(
            *(block, channels, columns, 4, 3 if alone else 2),
            width=min(128, columns),
            together=instruction == "wgmma",
            every=2,
        )
    # mma.sync takes its operands through registers: 8 warps to have them, and one stage less to fit 99 KB. dB and dC have
    # 4 warps, of whole rows each, and a quarter of the columns; in one launch with dx, or making states anew, they would spill.
    warps, stages = 4 if block == 16 and dtype.itemsize == 2 else 8, 2 if dtype.itemsize == 4 else 3
    return Tile(block, channels, columns, warps, 2, stages, 2 if share < 4 else 1, min(32, columns))


def whole(programs: int, multiprocessors: int) -> bool:
    """Whether the passes from token to token run over whole sequences; programs: of one sequence.

    A function of the model and the GPU alone: states are rounded differently at borders of segments, and the bits of a
    sequence must not depend on the batch around it. With segments another pass over x and B comes first, about half of the
    work of the main pass; without, one program is all that a multiprocessor gets, and leaves about half of it idle. So
    segments pay while a sequence has fewer programs than there are multiprocessors, up to the last eighth.
    """
    return 8 * programs >= 7 * multiprocessors


@dataclass(frozen=True)
class Call:
    """x [rows, length, heads, head_dim], dt, B and C alike: rows of tokens, with packed sequences one row."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    initial: Tensor | None
    plan: Plan
    tile: Tile
    dt_softplus: bool
    low: float
    high: float

    @property
    def tokens(self) -> int:
        return self.x.shape[0] * self.x.shape[1]

    @property
    def heads(self) -> int:
        return self.x.shape[2]

    @property
    def head_dim(self) -> int:
        return self.x.shape[3]

    @property
    def groups(self) -> int:
        return self.B.shape[2]

    @property
    def state(self) -> int:
        return self.B.shape[3]

    @property
    def pieces(self) -> int:
        return self.tile.pieces(self.head_dim)

    @property
    def skip(self) -> int:
        """The kernels' SKIP: no D, one number a head, or one a channel."""
        return 0 if self.D is None else self.D.dim()

    @property
    def precision(self) -> str:
        """The kernels' PRECISION: how fp32 is multiplied, or 16 bits; "apart": those by way of registers."""
        if self.x.dtype == torch.float32:
            return "tf32x3"
        return "apart" if by_registers(self.x.device) else "ieee"

    @cached_property
    def constants(self) -> dict:
        """What every kernel with a state is compiled for."""
        return self.plan.constants | dict(
            HEAD_DIM=self.head_dim,
            STATE=self.state,
            BLOCK_P=self.tile.channels,
            BLOCK_N=self.tile.columns,
            PRECISION=self.precision,
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The kernels' arguments `segments` to `heads_per_group`."""
        return self.plan.segments, self.x.shape[1], self.tokens, self.heads, self.heads // self.groups

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def new_states(self) -> Tensor:
        """Room for the state after each sequence."""
        return self.new(self.plan.sequences, self.heads, self.head_dim, self.state)


def strides(*tensors: Tensor) -> list[int]:
    """Of rows and of heads or groups, of each tensor, as the kernels take them.

    Those of tokens, which the model fixes, are compiled in: as constants they take no registers. The others are not: products
    with constants would all be formed before the loops over heads, and held in registers.
    """
    return [t.stride(dim) for t in tensors for dim in (0, 2)]


def prepare(
    x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, low, high, chunk_size, passes: int
) -> Call:
    """passes: how many passes from token to token run side by side; chunk_size is for others."""
    heads, head_dim, state = x.shape[2], x.shape[3], B.shape[3]
    instruction, multiprocessors = _device.matrix_instruction(x.device), _device.multiprocessors(x.device)
    pieces = tile(x.dtype, head_dim, state, instruction, False).pieces(head_dim)
    over_whole = whole(heads * pieces * passes, multiprocessors)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    alone = over_whole and sequences * heads * pieces <= multiprocessors
    tiles = tile(x.dtype, head_dim, state, instruction, alone)
    tiles = _tuned.tile(tiles, CHANGES, x.device, "selective_scan")
    plans = plan(*x.shape[:2], cu_seqlens, tiles.block, tiles.every, over_whole)
    x, B, C = (lines(t, cu_seqlens is not None) for t in (x, B, C))
    if cu_seqlens is not None:
        dt = dt.reshape(1, -1, heads)
    A, D, dt_bias, initial = (None if t is None else t.contiguous() for t in (A, D, dt_bias, initial_state))
    return Call(x, dt, A, B, C, D, dt_bias, initial, plans, tiles, dt_softplus, low, high)


def lines(t: Tensor, packed: bool) -> Tensor:
    """t [batch, length, heads, channels] with contiguous channels, packed as one row; a copy only where strides demand it."""
    t = t.reshape(1, -1, *t.shape[2:]) if packed else t
    _, token, head, channel = t.stride()
    near = SEGMENT * token + t.shape[2] * head < 2**31  # what the kernels add in 32 bits
    return t if channel == 1 and near else t.contiguous()
