"""selective_scan forward and backward: a head's state stays in registers, and forward no chunk's state goes through memory.

Forward. One program walks over the tokens of a sequence for one head, 64 a step, with the state [head_dim, state] in fp32
registers, and reads x, dt, B and C once. Where the heads of one sequence do not fill the GPU, it walks over a segment of 1,024
tokens in place of the whole: two passes before it, one that sums what each segment adds to the state and one, tiny, from
border to border, give what each segment starts from. No atomics, no waiting of programs for each other.
Backward, saving nothing: the same walk for states, and from the end for their gradients, writes both for each block of 64
tokens in x's dtype; then all blocks are independent (_triton_backward).

    launches                         forward                                    backward
    steps and decays                 1                                          1
    states at borders of segments    2 (none over whole sequences)              2 (none over whole sequences)
    main                             1                                          2: states of blocks, gradients of blocks
                                                                                (3 but on Hopper: the gradients in two)
    gradients of steps               -                                          1
    with cu_seqlens                  + 1: where segments lie, on the device     + 1

Bytes a token, bf16, against the least any kernel moves; and, in us for 8,192 tokens, what an H200's 4.3 TB/s take for them:
    Nano (64 heads x 64, 8 groups, state 128)    forward 40,600 of 20,600 (77)    backward 123,800 of 33,000 (236)
    Super (128 heads)                            forward 39,200 of 37,100 (75)    backward 235,200 of 57,900 (448)
Nano's forward pass goes by segments on 132 multiprocessors, Super's over whole sequences.

Bits. A sequence is cut from its own first token, and the choice between segments and sequences is one of the model and the GPU:
no bit depends on the batch, on packing, on the length, nor on later tokens. Over whole sequences the state after any multiple
of a block's tokens, put in as the initial state, continues a sequence with the bits of one long call; by segments, the state
after any multiple of SEGMENT tokens does. So decoding can repeat prefill bit for bit: keep the state of the last such border
and replay the tokens since.
chunk_size is accepted and ignored: blocks and segments are what suits the registers, and no bit depends on it.
Rounding: as the operands of products, states, decayed scores and scaled x are in x's dtype, all sums and states in fp32; fp32
inputs are multiplied as three TF32 products.
"""

import torch
from torch import Tensor

from nvfp4_kernels.ops._triton import INTERPRETED, refuses_device
from nvfp4_kernels.ops.selective_scan._triton_backward import backward as scan_backward
from nvfp4_kernels.ops.selective_scan._triton_call import CHANNELS, STATES, lines, prepare
from nvfp4_kernels.ops.selective_scan._triton_forward import forward as scan_forward
from nvfp4_kernels.ops.selective_scan._triton_states import borders
from nvfp4_kernels.ops.selective_scan._triton_steps import decays, gradients


def refuses(x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, dt_softplus, low, high, chunk_size) -> str | None:
    if x.dtype == torch.float64:
        return "float64"
    if x.shape[3] > CHANNELS or B.shape[3] > STATES:
        return f"head_dim {x.shape[3]}, state {B.shape[3]}: at most {CHANNELS} and {STATES}"
    if low < 0 and not dt_softplus:
        return f"dt_limit from {low}: steps below 0 have no logarithm"
    if INTERPRETED and x.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bits of bfloat16"
    return refuses_device(x)


def run(*arguments) -> tuple[Tensor, Tensor]:
    call = prepare(*arguments, passes=1)
    a, last = decays(call), call.new_states()
    found = borders(call, a, last) if call.plan.bordered else None
    return scan_forward(call, a, found, last).view(arguments[0].shape), last


def backward(dy: Tensor, dstate: Tensor | None, *arguments) -> tuple[Tensor | None, ...]:
    x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, *_ = arguments
    call = prepare(*arguments, passes=2)
    a = decays(call)
    dy = lines(dy.to(x.dtype), cu_seqlens is not None)
    dx, dB, dC, dD, dinitial, sums = scan_backward(call, a, dy, None if dstate is None else dstate.contiguous())
    ddt, dA, dbias = gradients(call, sums)
    return (
        *(dx.view(x.shape), ddt.view(dt.shape), dA.to(A.dtype), dB.view(B.shape), dC.view(C.shape), dD),
        None if dt_bias is None else dbias.to(dt_bias.dtype),
        None if initial_state is None else dinitial.to(initial_state.dtype),
    )
