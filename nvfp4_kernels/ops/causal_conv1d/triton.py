"""causal_conv1d forward and backward, one pass over memory each.

A program walks a span of tokens, for a block of channels that fill its lanes 16 bytes wide. The last width - 1 inputs stay
in registers, so that each input is loaded once but for the seams of spans. At the start of a sequence they are replaced by
its initial state or zeros; a program finds its first sequence by bisecting cu_seqlens, which costs a few hits of the cache
and neither a table in memory nor a look from the host. Backward forms the pre-activation again and carries the gradients of the
last width - 1 inputs likewise; a span's last ones are completed by width - 1 tokens of the next. Offsets are 64 bits wide.
dweight and dbias: a partial sum for each span, added up by torch: the same bits on every run.
"""

import torch
from torch import Tensor

from nvfp4_kernels.ops import _device
from nvfp4_kernels.ops._triton import as_rows, jit, launch, refuses_device, tl
from nvfp4_kernels.ops._triton_logistic import logistic

FORWARD_SPAN = 32  # tokens a program: many short programs balance the load, and 3 in 32 inputs are read twice
VARYING = ["tokens", "length", "sequences", "spans", "span_tokens"]  # one compiled kernel for all of their values
FORWARD_TOGETHER, BACKWARD_TOGETHER = 8, 4  # loads in flight: what the registers hold beside weights and windows


def refuses(x, weight, bias, initial_state, cu_seqlens, silu) -> str | None:
    return "float64" if x.dtype == torch.float64 else refuses_device(x)


def block(x: Tensor, warps: int) -> int:
    """Channels a program: 16 bytes a lane."""
    return warps * 32 * 16 // x.element_size()


def backward_span(tokens: int, blocks: int, device: torch.device) -> int:
    """Tokens a program: one wave of 8 warps an SM, as many as its registers hold, and at least 32, which the seams cost 10%."""
    span = tokens * blocks // (8 * _device.multiprocessors(device))
    return max(32, -(-span // BACKWARD_TOGETHER) * BACKWARD_TOGETHER)


@jit
def bound(cu_seqlens_ptr, sequence, sequences, length, PACKED: tl.constexpr):
    """The first token of a sequence; no token at all behind the last bound."""
    if PACKED:
        return tl.load(cu_seqlens_ptr + sequence, sequence <= sequences, 2147483647).to(tl.int32)
    return sequence * length


@jit
def sequence_of(token, cu_seqlens_ptr, sequences, length, PACKED: tl.constexpr):
    """The last sequence that starts at the token or before it."""
    if PACKED:
        low, high = 0, sequences
        while high - low > 1:
            middle = (low + high) // 2
            if tl.load(cu_seqlens_ptr + middle) <= token:
                low = middle
            else:
                high = middle
        return low
    return token // length


@jit
def only(inside, condition):
    """inside, where the scalar condition holds. (Triton's interpreter makes integers of it in `inside & condition`.)"""
    return tl.where(condition, inside, False)


@jit
def load_row(ptr, token, stride, channel, inside):
    return tl.load(ptr + tl.cast(token, tl.int64) * stride + channel, inside, 0.0)


@jit
def store_row(ptr, token, channels, channel, inside, row):
    tl.store(ptr + tl.cast(token, tl.int64) * channels + channel, row.to(ptr.dtype.element_ty), inside)


@jit
def load_state(ptr, sequence, k, channel, channels, inside, WIDTH: tl.constexpr):
    """Column k of a sequence's state; states come as [sequences, width - 1, channels], so that lanes read 16 bytes."""
    return tl.load(ptr + (tl.cast(sequence, tl.int64) * (WIDTH - 1) + k) * channels + channel, inside, 0.0)


@jit
def store_state(ptr, sequence, k, channel, channels, inside, state, WIDTH: tl.constexpr):
    """They go as the op promises them, [sequences, channels, width - 1]."""
    at = (tl.cast(sequence, tl.int64) * channels + channel) * (WIDTH - 1) + k
    tl.store(ptr + at, state.to(ptr.dtype.element_ty), inside)


@jit
def history(
    x_ptr, initial_ptr, token, start, sequence, x_stride, channel, inside, channels, WIDTH: tl.constexpr,
    INITIAL: tl.constexpr,
):  # fmt: skip
    """The width - 1 inputs before a token of the sequence that begins at start: tokens, then its initial state, or zeros."""
    window = ()
    for k in tl.static_range(WIDTH - 1):
        at = token - (WIDTH - 1) + k
        x = load_row(x_ptr, at, x_stride, channel, only(inside, at >= start)).to(tl.float32)
        if INITIAL:
            earlier = WIDTH - 1 + at - start
            mask = only(inside, (at < start) & (earlier >= 0))
            x += load_state(initial_ptr, sequence, earlier, channel, channels, mask, WIDTH).to(tl.float32)
        window = window + (x,)
    return window


@jit
def load_weight(weight_ptr, bias_ptr, channel, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr):
    """A vector for each tap. They come as one tile: tap by tap, each load would touch all of the weight's cache lines."""
    tap, weight, bias = tl.arange(0, 4)[None, :], (), tl.zeros([BLOCK], tl.float32)
    tile = tl.load(weight_ptr + channel[:, None] * WIDTH + tap, inside[:, None] & (tap < WIDTH), 0.0).to(tl.float32)
    for k in tl.static_range(WIDTH):
        weight = weight + (tl.sum(tl.where(tap == k, tile, 0.0), 1),)
    if BIASED:
        bias = tl.load(bias_ptr + channel, inside, 0.0).to(tl.float32)
    return weight, bias


@jit
def convolve(x, window, weight, bias, WIDTH: tl.constexpr):
    for k in tl.static_range(WIDTH - 1):
        bias += weight[k] * window[k]
    return bias + weight[WIDTH - 1] * x


@jit
def preactivation_gradient(x, dy, window, weight, bias, WIDTH: tl.constexpr, SILU: tl.constexpr):
    if SILU:
        pre = convolve(x, window, weight, bias, WIDTH)
        sigmoid = logistic(pre)
        dy = dy * sigmoid * (1.0 + pre * (1.0 - sigmoid))
    return dy


@jit
def products(sums, factor, taps, WIDTH: tl.constexpr):
    """sums + factor * taps, tap by tap."""
    added = ()
    for k in tl.static_range(WIDTH):
        added = added + (sums[k] + factor * taps[k],)
    return added


@jit(do_not_specialize=VARYING)
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, cu_seqlens_ptr, y_ptr, state_ptr, x_stride, tokens, length, channels,
    sequences, spans,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BIASED: tl.constexpr, INITIAL: tl.constexpr, PACKED: tl.constexpr,
    SPAN: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, BLOCK)
    span = tl.program_id(0) // blocks
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    if span < spans:
        weight, bias = load_weight(weight_ptr, bias_ptr, channel, inside, WIDTH, BLOCK, BIASED)
        first = span * SPAN
        sequence = sequence_of(first, cu_seqlens_ptr, sequences, length, PACKED)
        start = bound(cu_seqlens_ptr, sequence, sequences, length, PACKED)
        end = bound(cu_seqlens_ptr, sequence + 1, sequences, length, PACKED)
        window = history(
            x_ptr, initial_ptr, first, start, sequence, x_stride, channel, inside, channels, WIDTH, INITIAL
        )
        for token in range(first, min(first + SPAN, tokens), TOGETHER):
            xs = ()
            for i in tl.static_range(TOGETHER):
                xs = xs + (load_row(x_ptr, token + i, x_stride, channel, only(inside, token + i < tokens)),)
            for i in tl.static_range(TOGETHER):
                at = token + i
                if at == end and at < tokens:
                    sequence += 1
                    end = bound(cu_seqlens_ptr, sequence + 1, sequences, length, PACKED)
                    while end == at:
                        sequence += 1
                        end = bound(cu_seqlens_ptr, sequence + 1, sequences, length, PACKED)
                    window = history(
                        x_ptr, initial_ptr, at, at, sequence, x_stride, channel, inside, channels, WIDTH, INITIAL
                    )
                x = xs[i].to(tl.float32)
                y = convolve(x, window, weight, bias, WIDTH)
                if SILU:
                    y = y * logistic(y)
                store_row(y_ptr, at, channels, channel, only(inside, at < tokens), y)
                window = window[1:] + (x,)
    else:
        sequence = span - spans
        start = bound(cu_seqlens_ptr, sequence, sequences, length, PACKED)
        end = bound(cu_seqlens_ptr, sequence + 1, sequences, length, PACKED)
        last = history(x_ptr, initial_ptr, end, start, sequence, x_stride, channel, inside, channels, WIDTH, INITIAL)
        for k in tl.static_range(WIDTH - 1):
            store_state(state_ptr, sequence, k, channel, channels, inside, last[k], WIDTH)


@jit(do_not_specialize=VARYING)
def backward_kernel(
    dy_ptr, dstate_ptr, x_ptr, weight_ptr, bias_ptr, initial_ptr, cu_seqlens_ptr, dx_ptr, dinitial_ptr, partial_ptr,
    dy_stride, x_stride, tokens, length, channels, sequences, spans, span_tokens,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BIASED: tl.constexpr, INITIAL: tl.constexpr, PACKED: tl.constexpr,
    DSTATE: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, BLOCK)
    span = tl.program_id(0) // blocks
    channel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    weight, bias = load_weight(weight_ptr, bias_ptr, channel, inside, WIDTH, BLOCK, BIASED)
    zero = tl.zeros([BLOCK], tl.float32)
    gradients, dweight, dbias = (zero,) * (WIDTH - 1), (zero,) * WIDTH, zero
    if span < spans:
        first = span * span_tokens
        last = min(first + span_tokens, tokens)
        sequence = sequence_of(first, cu_seqlens_ptr, sequences, length, PACKED)
        start = bound(cu_seqlens_ptr, sequence, sequences, length, PACKED)
        end = bound(cu_seqlens_ptr, sequence + 1, sequences, length, PACKED)
        window = history(
            x_ptr, initial_ptr, first, start, sequence, x_stride, channel, inside, channels, WIDTH, INITIAL
        )
        # one more turn than the span has tokens completes the gradients of its last ones
        for token in range(first, first + tl.cdiv(last - first, TOGETHER) * TOGETHER + TOGETHER, TOGETHER):
            if token >= last:
                sums = partial_ptr + tl.cast(span, tl.int64) * (WIDTH + 1) * channels + channel
                for k in tl.static_range(WIDTH):
                    tl.store(sums + k * channels, dweight[k], inside)
                tl.store(sums + WIDTH * channels, dbias, inside)
            xs, dys = (), ()
            for i in tl.static_range(TOGETHER):
                mask = only(inside, token + i < tokens)
                xs = xs + (load_row(x_ptr, token + i, x_stride, channel, mask),)
                dys = dys + (load_row(dy_ptr, token + i, dy_stride, channel, mask),)
            for i in tl.static_range(TOGETHER):
                at = token + i
                if at == end:  # the end of all tokens counts as a start as well, of zeros
                    for k in tl.static_range(WIDTH - 1):
                        done = at - (WIDTH - 1) + k
                        mask = only(inside, (done >= first) & (done < last) & (done >= start))
                        dx = gradients[k]
                        if DSTATE:  # a sequence's last state holds just these inputs
                            dx += load_state(dstate_ptr, sequence, k, channel, channels, mask, WIDTH).to(tl.float32)
                        store_row(dx_ptr, done, channels, channel, mask, dx)
                    sequence += 1
                    start = at
                    end = bound(cu_seqlens_ptr, sequence + 1, sequences, length, PACKED)
                    while end == at:
                        sequence += 1
                        end = bound(cu_seqlens_ptr, sequence + 1, sequences, length, PACKED)
                    window = history(
                        x_ptr, initial_ptr, at, at, sequence, x_stride, channel, only(inside, at < tokens), channels,
                        WIDTH, INITIAL,
                    )  # fmt: skip
                x = xs[i].to(tl.float32)
                dpre = preactivation_gradient(x, dys[i].to(tl.float32), window, weight, bias, WIDTH, SILU)
                dbias += dpre
                dweight = products(dweight, dpre, window + (x,), WIDTH)
                gradients = products(gradients + (zero,), dpre, weight, WIDTH)
                done = at - (WIDTH - 1)
                mask = only(inside, (done >= first) & (done < last) & (done >= start))
                store_row(dx_ptr, done, channels, channel, mask, gradients[0])
                gradients = gradients[1:]
                window = window[1:] + (x,)
    else:  # the initial state of one sequence
        sequence = span - spans
        start = bound(cu_seqlens_ptr, sequence, sequences, length, PACKED)
        end = bound(cu_seqlens_ptr, sequence + 1, sequences, length, PACKED)
        window = history(
            x_ptr, initial_ptr, start, start, sequence, x_stride, channel, inside, channels, WIDTH, INITIAL
        )
        for i in tl.static_range(WIDTH - 1):
            at = start + i
            x = load_row(x_ptr, at, x_stride, channel, only(inside, at < end)).to(tl.float32)
            dy = load_row(dy_ptr, at, dy_stride, channel, only(inside, at < end)).to(tl.float32)
            dpre = preactivation_gradient(x, dy, window, weight, bias, WIDTH, SILU)
            dpre = tl.where(at < end, dpre, 0.0)
            gradients = products(gradients + (zero,), dpre, weight, WIDTH)
            dinitial = gradients[0]
            if DSTATE:  # of a sequence so short that its last state still holds this input
                mask = only(inside, at >= end)
                dinitial += load_state(dstate_ptr, sequence, at - end, channel, channels, mask, WIDTH).to(tl.float32)
            store_state(dinitial_ptr, sequence, i, channel, channels, inside, dinitial, WIDTH)
            gradients = gradients[1:]
            window = window[1:] + (x,)


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, states(x, weight, bias, initial_state, cu_seqlens, silu, y)


def states(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    y: Tensor | None = None,
) -> Tensor:
    """The state after each sequence alone; with y, what `run` gives goes there."""
    (batch, length, channels), rows, width = x.shape, as_rows(x), weight.shape[1]
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    state = x.new_empty(sequences, channels, width - 1)
    spans, size = 0 if y is None else -(-batch * length // FORWARD_SPAN), block(x, 2)
    launch(
        forward_kernel,
        ((spans + sequences) * -(-channels // size),),
        *(rows, weight.contiguous()),
        *(rows if t is None else t.contiguous() for t in (bias, columns(initial_state), cu_seqlens)),
        *(rows if y is None else y, state, rows.stride(0), batch * length, length, channels, sequences, spans),
        **dict(WIDTH=width, SILU=silu, BIASED=bias is not None, INITIAL=initial_state is not None),
        **dict(PACKED=cu_seqlens is not None, SPAN=FORWARD_SPAN, TOGETHER=FORWARD_TOGETHER, BLOCK=size),
        num_warps=2,
    )
    return state


def backward(
    dy: Tensor,
    dstate: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and initial_state."""
    (batch, length, channels), rows, width = x.shape, as_rows(x), weight.shape[1]
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    dx, dy = torch.empty_like(x, memory_format=torch.contiguous_format), as_rows(dy)
    dinitial = None if initial_state is None else torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    size = block(x, 1)
    blocks = -(-channels // size)
    span = backward_span(batch * length, blocks, x.device)
    spans = -(-batch * length // span)
    partial = torch.empty(spans, width + 1, channels, dtype=torch.float32, device=x.device)
    launch(
        backward_kernel,
        ((spans + (0 if initial_state is None else sequences)) * blocks,),
        *(dy, rows if dstate is None else columns(dstate), rows, weight.contiguous()),
        *(rows if t is None else t.contiguous() for t in (bias, columns(initial_state), cu_seqlens)),
        *(dx, rows if dinitial is None else dinitial, partial),
        *(dy.stride(0), rows.stride(0), batch * length, length, channels, sequences, spans, span),
        **dict(WIDTH=width, SILU=silu, BIASED=bias is not None, INITIAL=initial_state is not None),
        **dict(PACKED=cu_seqlens is not None, DSTATE=dstate is not None, TOGETHER=BACKWARD_TOGETHER, BLOCK=size),
        num_warps=1,
    )
    total = partial.sum(0)
    return dx, total[:width].t().to(weight.dtype), None if bias is None else total[width].to(bias.dtype), dinitial


def columns(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.transpose(1, 2).contiguous()
