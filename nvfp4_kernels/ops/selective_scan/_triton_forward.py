"""The main pass forward: y, token block by token block, with the state in registers, and the final states."""

from torch import Tensor

from nvfp4_kernels.ops._triton import jit, launch, tl
from nvfp4_kernels.ops.selective_scan._triton_call import Call, strides
from nvfp4_kernels.ops.selective_scan._triton_plan import (
    against,
    base_of,
    exponents,
    load_state,
    load_tile,
    locate,
    product,
    store_tile,
)
from nvfp4_kernels.ops.selective_scan._triton_states import advance


@jit
def forward_kernel(
    x_ptr, a_ptr, B_ptr, C_ptr, D_ptr, y_ptr, borders_ptr, first_ptr, last_ptr, table_ptr, firsts_ptr,
    x_row, x_head, B_row, B_group, C_row, C_group, segments, length, tokens, heads, heads_per_group,
    X_TOKEN: tl.constexpr, B_TOKEN: tl.constexpr, C_TOKEN: tl.constexpr, Y_TOKEN: tl.constexpr, HEAD_DIM: tl.constexpr,
    STATE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SKIP: tl.constexpr, FIRST: tl.constexpr,
    WHOLE: tl.constexpr, BORDERED: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """y of a segment (WHOLE: of a sequence) of one head, up to BLOCK_P channels of it; the state stays in registers."""
    PIECES: tl.constexpr = (HEAD_DIM + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    piece = program % PIECES
    head = program // PIECES % heads
    item = program // PIECES // heads
    sequence, row, number, start, end, _ = locate(
        table_ptr, firsts_ptr, item, segments, length, BLOCK, SEGMENT, WHOLE, PACKED
    )
    if sequence < 0:
        return
    group = head // heads_per_group
    dtype = x_ptr.dtype.element_ty
    cols = HEAD_DIM - piece * BLOCK_P
    q, p = tl.arange(0, BLOCK), tl.arange(0, BLOCK_P)
    x_ptr += row * x_row + head * x_head + piece * BLOCK_P
    B_ptr += row * B_row + group * B_group
    C_ptr += row * C_row + group * C_group
    y_ptr += row * length * Y_TOKEN + head * HEAD_DIM + piece * BLOCK_P
    a_ptr += tl.cast(head, tl.int64) * 2 * tokens + row * length + start
    if SKIP == 1:
        skip = tl.load(D_ptr + head).to(tl.float32)
    elif SKIP == 2:
        skip = tl.load(D_ptr + head * HEAD_DIM + piece * BLOCK_P + p, p < cols, 0.0).to(tl.float32)[None, :]
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    if FIRST:
        at = ((sequence * heads + head) * HEAD_DIM + piece * BLOCK_P) * STATE
        state += load_state(first_ptr + at, tl.where(number == 0, cols, 0), STATE, BLOCK_P, BLOCK_N)
    stop = end
    if not WHOLE:
        stop = tl.minimum(end, start + SEGMENT)
    if BORDERED:
        at = ((tl.cast(item, tl.int64) * heads + head) * HEAD_DIM + piece * BLOCK_P) * STATE
        state += load_state(borders_ptr + at, tl.where(number > 0, cols, 0), STATE, BLOCK_P, BLOCK_N)

    ends = (stop == end) & (stop - start < SEGMENT)
    count = (stop - start).to(tl.int32)
    x_ptr += start * X_TOKEN
    B_ptr += start * B_TOKEN
    C_ptr += start * C_TOKEN
    y_ptr += start * Y_TOKEN
    for k in tl.range(0, tl.cdiv(count, BLOCK), disable_licm=True):
        base, t, left = base_of(k, count, WHOLE, BLOCK, SEGMENT)
        inside = t < left
        C = load_tile(C_ptr + base * C_TOKEN, C_TOKEN, t, 0, inside, STATE, BLOCK_N).to(dtype)
        B = load_tile(B_ptr + base * B_TOKEN, B_TOKEN, t, 0, inside, STATE, BLOCK_N).to(dtype)
        scores = against(C, B, PRECISION)
        # as of a token that reads and of one that gives: beyond the end, each so that nothing comes of it
        a = tl.load(a_ptr + base + t, inside, float("-inf"))
        a_from = tl.load(a_ptr + base + t, inside, 0.0)
        log_step = tl.load(a_ptr + tokens + base + t, inside, float("-inf"))
        between = exponents(a[:, None], a_from[None, :], log_step[None, :], PRECISION)
        mixed = (scores * tl.exp2(tl.where(q[:, None] >= q[None, :], between, float("-inf")))).to(dtype)
        y = against(C, state.to(dtype), PRECISION) * tl.exp2(a)[:, None]
        x = load_tile(x_ptr + base * X_TOKEN, X_TOKEN, t, 0, inside, cols, BLOCK_P)
        if SKIP > 0:
            y += x.to(tl.float32) * skip
        y = product(mixed, x, y, PRECISION)
        to = y_ptr + base * Y_TOKEN + (t[:, None] * Y_TOKEN + p[None, :])
        tl.store(to, y.to(dtype), inside[:, None] & (p < cols)[None, :])
        a_last = tl.load(a_ptr + tl.minimum(count, k * BLOCK + BLOCK) - 1)
        state = advance(state, x, tl.exp2(a_last - a_from + log_step), B, tl.exp2(a_last), PRECISION)
    if WHOLE or ends:
        at = ((sequence * heads + head) * HEAD_DIM + piece * BLOCK_P) * STATE
        store_tile(last_ptr + at, STATE, state, cols, STATE)


def forward(call: Call, a: Tensor, found: Tensor | None, last: Tensor) -> Tensor:
    """y [rows, length, heads, head_dim]; the final states go to `last`. found: the states at borders, where there are any."""
    x, B, C = call.x, call.B, call.C
    y = call.new(*x.shape, dtype=x.dtype)
    launch(
        forward_kernel,
        (call.plan.items * call.heads * call.pieces,),
        *(x, a, B, C, call.D, y, found, call.initial, last, call.plan.table, call.plan.firsts),
        *(*strides(x, B, C), *call.sizes),
        **dict(X_TOKEN=x.stride(1), B_TOKEN=B.stride(1), C_TOKEN=C.stride(1), Y_TOKEN=y.stride(1)),
        **dict(SKIP=call.skip, FIRST=call.initial is not None, WHOLE=call.plan.whole),
        **dict(BORDERED=found is not None),
        **call.constants,
        num_warps=call.tile.warps,
        num_stages=call.tile.forward,
    )
    return y
