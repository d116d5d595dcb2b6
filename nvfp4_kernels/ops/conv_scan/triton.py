"""conv_scan: by segments, x is convolved in the pass over segments, B and C before it; else the two ops' kernels in turn.

The pass over segments (of selective_scan's forward) reads x for the states at their borders; here it takes x as it came,
convolves it once and writes what the main pass then reads. Bytes a token at Nano's sizes (64 heads x 64, 8 groups, state 128),
bf16: 57,000, of 65,200 by the two ops (24,600 and 40,600). Over whole sequences (Super on 132 multiprocessors: 41,000 and
39,200) only the main pass reads x, and of sequences shorter than a segment there is no other.

What else could be fused, and why it is not. An H200's memory moves 18.6 bytes a clock and multiprocessor, and the main pass,
for 64 tokens of one head, takes 1,024 clocks to issue its instructions on sm_90 (sm_120: 1,390).
- x, convolved by the main pass as it loads it, would save 8,200 bytes more, or 16,400 of x over whole sequences: 440 or 880
  clocks. Four shifted tiles in place of one take 640 more (sm_120: 1,400), and the registers to hold them are not there.
- B and C, convolved so, would be so by each of the 8 heads of a group: four times as many values, 2,500 clocks for 440.
- The norm. Its group is that of B and C, 8 heads, and the state of one fills the registers of a program. Between the programs
  of a group and a norm over them y goes to memory and back: with gate and sums of squares in the main pass that is y out, z in,
  y in and the result out, 32,800 bytes, as with the norm by itself. Blocks of a cluster add their sums, and share the convolved
  B and C, through each other's shared memory: csrc/mixer_scan, in CUDA.
"""

from dataclasses import replace

from torch import Tensor

from nvfp4_kernels.ops.causal_conv1d import triton as conv
from nvfp4_kernels.ops.conv_scan import _in_turn
from nvfp4_kernels.ops.conv_scan._triton_segments import convolved
from nvfp4_kernels.ops.selective_scan import triton as scan
from nvfp4_kernels.ops.selective_scan._triton_call import lines, prepare
from nvfp4_kernels.ops.selective_scan._triton_forward import forward
from nvfp4_kernels.ops.selective_scan._triton_steps import decays


def refuses(*arguments) -> str | None:
    return _in_turn.refuses(conv, scan, *arguments)


def run(
    xBC, dt, weight, bias, A, D, dt_bias, conv_state, initial_state, cu_seqlens, groups, state, low, high, chunk_size
) -> tuple[Tensor, Tensor, Tensor]:
    x, B, C = _in_turn.split(xBC, A.shape[0], groups, state)
    call = prepare(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, True, low, high, chunk_size, passes=1)
    a, last, found, packed = decays(call), call.new_states(), None, cu_seqlens is not None
    if call.plan.bordered:
        inner = xBC.shape[2] - 2 * groups * state
        of_x, of_shared = zip(
            *(_halves(t, inner, dim) for t, dim in ((weight, 0), (bias, 0), (conv_state, 1))), strict=True
        )
        mixed, _ = conv.run(xBC[..., inner:], *of_shared, cu_seqlens, True)
        B, C = (lines(t.unflatten(-1, (groups, state)), packed) for t in mixed.chunk(2, -1))
        call, found = convolved(replace(call, B=B, C=C), a, *of_x, last)
        conv_last = conv.states(xBC, weight, bias, conv_state, cu_seqlens, True)
    else:
        mixed, conv_last = conv.run(xBC, weight, bias, conv_state, cu_seqlens, True)
        x, B, C = (lines(t, packed) for t in _in_turn.split(mixed, A.shape[0], groups, state))
        call = replace(call, x=x, B=B, C=C)
    return forward(call, a, found, last).view(*xBC.shape[:2], *x.shape[2:]), conv_last, last


def backward(*arguments) -> tuple[Tensor | None, ...]:
    return _in_turn.backward(conv, scan, *arguments)


def _halves(t: Tensor | None, size: int, dim: int) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if t is None else t.split((size, t.shape[dim] - size), dim)
