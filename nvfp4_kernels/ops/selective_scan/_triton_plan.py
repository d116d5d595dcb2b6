"""How the Triton kernels cut sequences: blocks and segments, and which of them a program works on.

Every sequence is cut from its own first token: BLOCK tokens are one matrix product, SEGMENT tokens one unit of parallel work.
Nothing of it depends on the batch, on lengths or on packing, so neither do the bits. With cu_seqlens the host knows no length:
there are at most tokens / SEGMENT + sequences segments, a table on the device says where each lies, and programs beyond the
last one return at once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nvfp4_kernels.ops._triton import jit, launch, tl
from nvfp4_kernels.ops._triton_numerics import apart

SEGMENT = 1024
FIELDS = (
    5  # of a segment in the table: sequence (-1: none), its number in it, first token, end of the sequence, first block
)
SCANNED = 64  # sequences that plan_kernel looks at in one step


@dataclass(frozen=True)
class Plan:
    """The sequences of one call: rows of `length` tokens each, or, with a table, packed into one row of `length` tokens.

    every: of so many blocks the backward pass keeps one state in memory.
    whole: the passes from token to token run over whole sequences; else over segments, in parallel.
    """

    sequences: int
    length: int
    block: int
    segment: int
    every: int
    whole: bool
    table: Tensor | None = None
    firsts: Tensor | None = None  # the first segment of each sequence, and one past the last

    @property
    def segments(self) -> int:
        """At most so many in all; a sequence without tokens has one."""
        each = max(1, -(-self.length // self.segment))
        return self.sequences * each if self.table is None else self.table.shape[1]

    @property
    def items(self) -> int:
        """Of the passes from token to token."""
        return self.sequences if self.whole else self.segments

    @property
    def bordered(self) -> bool:
        """Whether a sequence may reach a border between segments."""
        return not self.whole and self.length >= self.segment

    @property
    def blocks(self) -> int:
        """At most so many in all."""
        if self.table is None:
            return self.sequences * -(-self.length // self.block)
        return self.length // self.block + self.sequences

    @property
    def kept_states(self) -> int:
        """At most so many, one for `every` blocks of a sequence."""
        return (self.blocks + self.sequences * (self.every - 1)) // self.every

    @property
    def block_items(self) -> int:
        """Programs of which each finds a block by locate_block, or that there is none."""
        return self.blocks if self.table is None else self.segments * (self.segment // self.block)

    @property
    def constants(self) -> dict:
        """What every kernel that looks for its tokens is compiled for."""
        return dict(BLOCK=self.block, SEGMENT=self.segment, PACKED=self.table is not None)


def plan(batch: int, length: int, cu_seqlens: Tensor | None, block: int, every: int, whole: bool) -> Plan:
    """For [batch, length, ...]; with cu_seqlens all its tokens are one row."""
    if cu_seqlens is None:
        return Plan(batch, length, block, SEGMENT, every, whole)
    sequences = cu_seqlens.numel() - 1
    segments = batch * length // SEGMENT + sequences
    table = torch.empty(FIELDS, segments, dtype=torch.int64, device=cu_seqlens.device)
    firsts = torch.empty(sequences + 1, dtype=torch.int32, device=cu_seqlens.device)
    launch(
        plan_kernel,
        (-(-segments // SCANNED),),
        *(cu_seqlens, table, firsts, sequences, segments),
        **dict(BLOCK=block, SEGMENT=SEGMENT, SCANNED=SCANNED),
    )
    return Plan(sequences, batch * length, block, SEGMENT, every, whole, table, firsts)


@jit
def plan_kernel(
    cu_seqlens_ptr, table_ptr, firsts_ptr, sequences, segments,
    BLOCK: tl.constexpr, SEGMENT: tl.constexpr, SCANNED: tl.constexpr,
):  # fmt: skip
    """The table's columns of SCANNED segments: each counts the sequences that end before it."""
    segment = tl.program_id(0) * SCANNED + tl.arange(0, SCANNED)
    sequence = tl.zeros([SCANNED], tl.int32)
    first = tl.zeros([SCANNED], tl.int32)  # of its sequence
    block = tl.zeros([SCANNED], tl.int32)
    before = 0
    for s in range(0, sequences, SCANNED):
        each = s + tl.arange(0, SCANNED)
        there = each < sequences
        start = tl.load(cu_seqlens_ptr + each, there, 0).to(tl.int64)
        length = tl.load(cu_seqlens_ptr + each + 1, there, 0).to(tl.int64) - start
        count = tl.where(there, tl.maximum(tl.cdiv(length, SEGMENT), 1), 0).to(tl.int32)
        end = before + tl.cumsum(count, 0)
        if tl.program_id(0) == 0:
            tl.store(firsts_ptr + each, end - count, there)
        passed = (end[None, :] <= segment[:, None]) & there[None, :]
        sequence += tl.sum(passed.to(tl.int32), 1)
        first += tl.sum(tl.where(passed, count[None, :], 0), 1)
        block += tl.sum(tl.where(passed, tl.cdiv(length, BLOCK).to(tl.int32)[None, :], 0), 1)
        before += tl.sum(count, 0)
    if tl.program_id(0) == 0:
        tl.store(firsts_ptr + sequences, before)
    exists = sequence < sequences
    number = (segment - first).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + sequence, exists, 0).to(tl.int64)
    stop = tl.load(cu_seqlens_ptr + sequence + 1, exists, 0).to(tl.int64)
    column, inside = table_ptr + segment, segment < segments
    tl.store(column, tl.where(exists, sequence, -1).to(tl.int64), inside)
    tl.store(column + segments, number, inside)
    tl.store(column + 2 * segments, start + number * SEGMENT, inside)
    tl.store(column + 3 * segments, stop, inside)
    tl.store(column + 4 * segments, block + number * (SEGMENT // BLOCK), inside)


@jit
def locate(
    table_ptr, firsts_ptr, item, segments, length,
    BLOCK: tl.constexpr, SEGMENT: tl.constexpr, WHOLE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Of a segment, or of a whole sequence: (sequence, or -1 where there is none; row; number of the segment; first token; end
    of the sequence; first block). Tokens count from the row's first; all int64."""
    item = item.to(tl.int64)
    if PACKED:
        if WHOLE:
            item = tl.load(firsts_ptr + item).to(tl.int64)
        column = table_ptr + item
        sequence = tl.load(column)
        row = sequence * 0
        number = tl.load(column + segments)
        start = tl.load(column + 2 * segments)
        stop = tl.load(column + 3 * segments)
        block = tl.load(column + 4 * segments)
    else:
        each = tl.cast(1, tl.int64)
        if not WHOLE:
            each = tl.maximum(tl.cdiv(length, SEGMENT), 1).to(tl.int64)
        sequence = item // each
        row = sequence
        number = item % each
        start = number * SEGMENT
        stop = start * 0 + length
        block = sequence * tl.cdiv(length, BLOCK) + number * (SEGMENT // BLOCK)
    return sequence, row, number, start, stop, block


@jit
def locate_block(
    table_ptr, firsts_ptr, item, segments, length, BLOCK: tl.constexpr, SEGMENT: tl.constexpr, PACKED: tl.constexpr
):
    """Of a block: (sequence; row; first token; how many tokens it has, none where there is no such block; its number in the
    call, and in the sequence)."""
    if PACKED:
        EACH: tl.constexpr = SEGMENT // BLOCK
        sequence, row, number, start, stop, block = locate(
            table_ptr, firsts_ptr, item // EACH, segments, length, BLOCK, SEGMENT, False, True
        )
        start += item % EACH * BLOCK
        block += item % EACH
        number = number * EACH + item % EACH
        left = tl.where(sequence < 0, 0, stop - start)
    else:
        each = tl.cdiv(length, BLOCK)
        block = item.to(tl.int64)
        sequence = block // each
        row = sequence
        number = block % each
        start = number * BLOCK
        left = length - start
    return sequence, row, start, tl.minimum(left, BLOCK).to(tl.int32), block, number


@jit
def kept_state(sequence, block, number, EVERY: tl.constexpr):
    """The place of the state that a block enters, or the last kept one before: kept for every EVERY-th of a sequence."""
    return (block - number + sequence * (EVERY - 1)) // EVERY + number // EVERY


@jit
def base_of(block, count, WHOLE: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr):
    """(base, t, left): the block's tokens are base + t of its program's `count`, those of them with t < left.

    From a base every SEGMENT tokens all offsets fit 32 bits.
    """
    q = tl.arange(0, BLOCK)
    if WHOLE:
        number = block // (SEGMENT // BLOCK)
        return tl.cast(number, tl.int64) * SEGMENT, block % (SEGMENT // BLOCK) * BLOCK + q, count - number * SEGMENT
    else:
        return 0, block * BLOCK + q, count


@jit
def load_tile(ptr, stride, t, offset, inside, cols, COLS: tl.constexpr):
    """Rows t, `stride` apart, from ptr + offset on, [BLOCK, COLS]; zeros outside and from column `cols` on.

    All offsets are added in 32 bits before they meet the pointer: formed anew each time, they take no registers between.
    """
    col = tl.arange(0, COLS)
    at = ptr + (t[:, None] * stride + (col[None, :] + offset))
    return tl.load(at, inside[:, None] & (col < cols)[None, :], 0.0)


@jit
def product(u, v, sums, PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr = False):
    """sums, unless None, + u v, or u v^T."""
    if PRECISION == "apart":
        v = apart(v)
    if TRANSPOSED:  # behind the detour, which takes more registers for a transposed tile
        v = tl.trans(v)
    return tl.dot(u, v, sums, input_precision="tf32x3" if PRECISION == "tf32x3" else "ieee")


@jit
def against(u, v, PRECISION: tl.constexpr):
    """u v^T, rows of channels or of a state against each other.

    Of 256 columns both parts of fp32 operands would not fit the registers: 32 columns at a time are one warp's.
    """
    if PRECISION == "tf32x3" and u.shape[1] > 128:
        PARTS: tl.constexpr = u.shape[1] // 32
        u = tl.permute(tl.reshape(u, [u.shape[0], PARTS, 32]), [1, 0, 2])
        v = tl.permute(tl.reshape(v, [v.shape[0], PARTS, 32]), [1, 2, 0])
        return tl.sum(tl.dot(u, v, input_precision=PRECISION), 0)
    else:
        return product(u, v, None, PRECISION, True)


@jit
def exponents(a, a_from, log_step, PRECISION: tl.constexpr):
    """log2 of the decays from tokens j to tokens i times step_j; a is [i, 1] and the others [1, j], or the other way round.

    Difference first: where the sums a are large, what is near the diagonal keeps its accuracy. Rounding of a_j - log2(step_j),
    2^-24 of a_j, hides behind that of 16-bit operands, and one number for each j takes half of the registers.
    """
    if PRECISION != "tf32x3":
        return a - (a_from - log_step)
    else:
        return (a - a_from) + log_step


@jit
def load_state(ptr, rows, STATE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """A state [head_dim, STATE], or BLOCK_P rows of it, in fp32; zeros from row `rows` on."""
    p, n = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_N)[None, :]
    return tl.load(ptr + (p * STATE + n), (p < rows) & (n < STATE), 0.0).to(tl.float32)


@jit
def store_tile(ptr, stride, tile, rows, cols):
    """The tile's first rows and columns, its rows `stride` apart."""
    row, col = tl.arange(0, tile.shape[0])[:, None], tl.arange(0, tile.shape[1])[None, :]
    tl.store(ptr + (row * stride + col), tile.to(ptr.dtype.element_ty), (row < rows) & (col < cols))
