"""The pass over segments that comes before the scan of several of them, convolving x on its way."""

from dataclasses import replace

from torch import Tensor

from nvfp4_kernels.ops._triton import jit, launch, tl
from nvfp4_kernels.ops._triton_logistic import logistic
from nvfp4_kernels.ops.causal_conv1d.triton import columns, convolve, load_weight
from nvfp4_kernels.ops.selective_scan._triton_call import Call, strides
from nvfp4_kernels.ops.selective_scan._triton_plan import load_tile, locate, store_tile
from nvfp4_kernels.ops.selective_scan._triton_states import advance, combine


@jit
def segments_kernel(
    x_ptr, B_ptr, a_ptr, weight_ptr, bias_ptr, initial_ptr, convolved_ptr, borders_ptr, through_ptr, end_ptr, table_ptr,
    firsts_ptr, x_row, x_head, B_row, B_group, segments, length, tokens, heads, heads_per_group,
    X_TOKEN: tl.constexpr, B_TOKEN: tl.constexpr, HEAD_DIM: tl.constexpr, STATE: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, BIASED: tl.constexpr, INITIAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, SEGMENT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A segment of one head, up to BLOCK_P channels of it: x after convolution and SiLU, and the state that comes of it from
    zero, which goes to the next border, or, of a sequence's last segment where that is full, to end_ptr."""
    PIECES: tl.constexpr = (HEAD_DIM + BLOCK_P - 1) // BLOCK_P
    program = tl.program_id(0)
    piece = program % PIECES
    head = program // PIECES % heads
    item = program // PIECES // heads
    sequence, row, number, start, end, _ = locate(
        table_ptr, firsts_ptr, item, segments, length, BLOCK, SEGMENT, False, PACKED
    )
    if sequence < 0:
        return
    first, cols = head * HEAD_DIM + piece * BLOCK_P, HEAD_DIM - piece * BLOCK_P
    p = tl.arange(0, BLOCK_P)
    taps, bias = load_weight(weight_ptr, bias_ptr, first + p, p < cols, WIDTH, BLOCK_P, BIASED)
    weight = ()
    for k in tl.static_range(WIDTH):
        weight = weight + (taps[k][None, :],)
    x_ptr += row * x_row + head * x_head + piece * BLOCK_P + start * X_TOKEN
    B_ptr += row * B_row + head // heads_per_group * B_group + start * B_TOKEN
    a_ptr += tl.cast(head, tl.int64) * 2 * tokens + row * length + start
    initial_ptr += sequence * (WIDTH - 1) * heads * HEAD_DIM + first
    convolved_ptr += (row * length + start) * heads * HEAD_DIM + first
    state, through = tl.zeros([BLOCK_P, BLOCK_N], tl.float32), 0.0
    floor = tl.where(number == 0, 0, -WIDTH)  # the tokens from here on belong to the sequence
    stop = tl.minimum(end, start + SEGMENT)
    count = (stop - start).to(tl.int32)
    for k in tl.range(0, tl.cdiv(count, BLOCK), disable_licm=True):
        t = k * BLOCK + tl.arange(0, BLOCK)
        inside = t < count
        window = ()
        for back in tl.static_range(WIDTH - 1, -1, -1):
            at = t - back
            x = load_tile(x_ptr, X_TOKEN, at, 0, inside & (at >= floor), cols, BLOCK_P)
            if INITIAL and back > 0:
                x += load_tile(initial_ptr, heads * HEAD_DIM, WIDTH - 1 + at, 0, inside & (at < floor), cols, BLOCK_P)
            window = window + (x,)
        made = convolve(window[WIDTH - 1], window, weight, bias[None, :], WIDTH)
        u = (made * logistic(made)).to(x_ptr.dtype.element_ty)
        to = convolved_ptr + (t[:, None] * (heads * HEAD_DIM) + p[None, :])
        tl.store(to, u, inside[:, None] & (p < cols)[None, :])
        v = load_tile(B_ptr, B_TOKEN, t, 0, inside, STATE, BLOCK_N).to(u.dtype)
        a_last = tl.load(a_ptr + tl.minimum(count, k * BLOCK + BLOCK) - 1)
        log_step = tl.load(a_ptr + tokens + t, inside, float("-inf"))
        weighed = a_last - tl.load(a_ptr + t, inside, 0.0) + log_step
        state = advance(state, u, tl.exp2(weighed), v, tl.exp2(a_last), PRECISION)
        through += a_last
    slot = tl.cast(item, tl.int64) * heads + head
    tl.store(through_ptr + slot, through)
    if stop < end:
        at = ((slot + heads) * HEAD_DIM + piece * BLOCK_P) * STATE
        store_tile(borders_ptr + at, STATE, state, cols, STATE)
    elif count == SEGMENT:
        at = ((sequence * heads + head) * HEAD_DIM + piece * BLOCK_P) * STATE
        store_tile(end_ptr + at, STATE, state, cols, STATE)


def convolved(
    call: Call, a: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor | None, end: Tensor
) -> tuple[Call, Tensor]:
    """The call with x after its convolution, and the states at the borders between segments, as _triton_states.borders."""
    x, B = call.x, call.B
    mixed = call.new(*x.shape, dtype=x.dtype)
    found = call.new(1, call.plan.segments, call.heads, call.head_dim, call.state)
    through = call.new(1, call.plan.segments, call.heads)
    launch(
        segments_kernel,
        (call.plan.segments * call.heads * call.pieces,),
        *(x, B, a, weight.contiguous()),
        *(x if t is None else t.contiguous() for t in (bias, columns(conv_state))),
        *(mixed, found, through, end, call.plan.table, call.plan.firsts, *strides(x, B), *call.sizes),
        **dict(X_TOKEN=x.stride(1), B_TOKEN=B.stride(1), WIDTH=weight.shape[1]),
        **dict(BIASED=bias is not None, INITIAL=conv_state is not None),
        **call.constants,
        **dict(maxnreg=128),  # two programs a multiprocessor
        num_warps=8,
        num_stages=1,  # with loads in flight the shifted tiles would not come out of the first-level cache
    )
    combine(call, found, through, end=end)
    return replace(call, x=mixed), found
