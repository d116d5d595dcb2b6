"""mixer_scan through csrc/mixer_scan/cuda.cu: which kernel, with which parameters.

A sequence has few blocks (Nano 32, Super 64, Ultra 64): fewer in all than half the multiprocessors are refused, for Triton cuts
sequences into segments. By instructions (cuda.cu) one sequence of Nano's takes 52 ns a token, three 17, where the bytes that
Triton moves take an H200 21; unmeasured.
"""

import struct

import torch
from torch import Tensor

from nvfp4_kernels.ops import _cuda, _device
from nvfp4_kernels.ops._cuda import address

HEAD_DIM, STATE, WIDTH, TOKENS = 64, 128, 4, 64  # csrc/mixer_scan/cuda.cu; TOKENS: of a chunk
# Heads of a B/C group: heads a block and blocks a cluster, those first that send B and C to fewest blocks.
SHAPES = {8: ((2, 4), (1, 8)), 16: ((2, 8),), 32: ((4, 8),)}

TOKENS_LAUNCH = struct.Struct("Qq")  # csrc/mixer_scan/launch.h
LAUNCH = struct.Struct("48s12Qiifff4x")


def shared_bytes(heads: int, cluster: int) -> int:
    """Of a block: csrc/mixer_scan/cuda.cu's Memory."""
    width, part = heads * HEAD_DIM, 2 * STATE // cluster
    inputs = 2 * (TOKENS + WIDTH - 1) * (width + part)
    tiles = 2 * TOKENS * (2 * width + 2 * STATE) + heads * 10 * 512
    return inputs + tiles + 4 * (WIDTH + 1) * (width + part) + 4 * width + 4 * TOKENS * (8 * heads + cluster)


def shape(heads: int, most_shared: int) -> tuple[int, int] | None:
    """Heads a block and blocks a cluster for a group of so many heads; None where no kernel fits."""
    return next((s for s in SHAPES.get(heads, ()) if shared_bytes(*s) <= most_shared), None)


def refuses(
    xBC, z, dt, weight, bias, A, D, dt_bias, norm_weight, conv_state, initial_state, cu_seqlens, groups, *options
) -> str | None:
    narrow = {"xBC": xBC, "z": z, "dt": dt}
    wide = next((name for name, t in narrow.items() if t.dtype != torch.bfloat16), None)
    if wide:
        return f"the CUDA kernels take bfloat16, {wide} is {narrow[wide].dtype}"
    heads, inner = A.shape[0], z.shape[2]
    sizes = inner // heads, (xBC.shape[2] - inner) // (2 * groups), weight.shape[1]
    if sizes != (HEAD_DIM, STATE, WIDTH):
        return f"head_dim {HEAD_DIM}, state {STATE} and width {WIDTH} only, not {sizes}"
    for name, t in (("xBC", xBC), ("z", z)):
        if t.data_ptr() % 16 or t.stride(2) != 1 or t.stride(1) % 8:
            return f"{name}: tokens do not begin at multiples of 16 bytes"
    count = xBC.shape[0] * xBC.shape[1]
    if not 0 < count < 2**31 - 2 * TOKENS:
        return f"{count} tokens"
    for name, t in narrow.items():
        if t.shape[0] > 1 and t.stride(0) != t.shape[1] * t.stride(1):
            return f"{name}: rows do not follow one another"
    chosen = shape(heads // groups, _device.most_shared(xBC.device))
    if chosen is None:
        return f"no cluster of blocks holds the {heads // groups} heads of a group here"
    sequences = xBC.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if sequences > 65535:
        return "more than 65,535 sequences"
    blocks = sequences * heads // chosen[0]
    if 2 * blocks < _device.multiprocessors(xBC.device):
        return f"{blocks} blocks would leave most multiprocessors idle"
    return _cuda.refuses_clusters(xBC) or _cuda.refuses_device("mixer_scan", xBC)


def run(
    xBC, z, dt, weight, bias, A, D, dt_bias, norm_weight, conv_state, initial_state, cu_seqlens, groups, low, high, eps,
    chunk_size,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """chunk_size is for others: a sum over chunks of another size would be no better."""
    (batch, length, channels), heads = xBC.shape, A.shape[0]
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    weights = [
        None if t is None else t.to(torch.float32).contiguous() for t in (weight, bias, A, D, dt_bias, norm_weight)
    ]
    before = None if conv_state is None else conv_state.to(xBC.dtype).contiguous()
    initial = None if initial_state is None else initial_state.to(torch.float32).contiguous()
    if initial is not None and initial.data_ptr() % 8:  # the kernel reads 8 bytes at once
        initial = initial.clone()
    bounds = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    dt = dt if dt.stride(2) == 1 else dt.contiguous()
    y = torch.empty(batch, length, heads * HEAD_DIM, dtype=xBC.dtype, device=xBC.device)
    conv_last = torch.empty(sequences, channels, WIDTH - 1, dtype=xBC.dtype, device=xBC.device)
    last = torch.empty(sequences, heads, HEAD_DIM, STATE, dtype=torch.float32, device=xBC.device)
    parameters = LAUNCH.pack(
        b"".join(TOKENS_LAUNCH.pack(t.data_ptr(), t.stride(1)) for t in (xBC, z, dt)),
        *(address(t) for t in (*weights, before, initial, bounds, y, conv_last, last)),
        *(length, groups, low, high, eps),
    )
    in_block, cluster = shape(heads // groups, _device.most_shared(xBC.device))
    name, shared = f"mixer_scan_{in_block}x{cluster}", shared_bytes(in_block, cluster)
    _cuda.launch("mixer_scan", name, (groups * cluster, sequences), 128 * in_block, shared, parameters, xBC)
    return y, conv_last, last
