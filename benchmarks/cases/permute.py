"""8,192 tokens to their experts and back: Nano's hidden states, six rows a token, and Super's latent ones, 22 rows a token."""

import torch

from nvfp4_kernels.ops.permute import triton


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def round_trip(tokens: int, top_k: int, features: int):
    order, inverse = empty(tokens * top_k, dtype=torch.int64), empty(tokens, top_k, dtype=torch.int64)
    weights, x = empty(tokens, top_k, dtype=torch.float32), empty(tokens, features)
    rows = triton.run(x, order, inverse)
    triton.combine(rows, order, inverse, None)
    triton.combine(rows, order, inverse, weights)
    triton.combine_backward(x, rows, order, inverse, weights)


CASES = {
    "Nano": lambda: round_trip(8192, 6, 2688),
    "Super": lambda: round_trip(8192, 22, 1024),
}
