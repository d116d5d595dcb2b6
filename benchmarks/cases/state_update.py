"""One token of 64 sequences through Nano's and Super's mixers; speculation's 4 tokens; a rounded 16-bit state."""

import math

import torch

from nvfp4_kernels.ops.state_update import triton


def update(heads: int, tokens: int = 1, dtype=torch.float32, noisy: bool = False, keeps_all: bool = False):
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    state, x, dt = empty(64, heads, 64, 128, dtype=dtype), empty(64, tokens, heads, 64), empty(64, tokens, heads)
    B, per_head, indices = empty(64, tokens, 8, 128), empty(heads, dtype=torch.float32), empty(64, dtype=torch.int32)
    intermediate = empty(64, tokens, heads, 64, 128, dtype=dtype) if keeps_all else None
    noise = empty(2, dtype=torch.int64) if noisy else None
    triton.run(
        *(state, x, dt, per_head, B, B, per_head, x, per_head, indices, intermediate, noise, True, 0.0, math.inf)
    )


CASES = {
    "Nano": lambda: update(64),
    "Super": lambda: update(128),
    "Super, 4 tokens kept": lambda: update(128, 4, keeps_all=True),
    "Super fp16, noise": lambda: update(128, dtype=torch.float16, noisy=True),
    "Super bf16, noise": lambda: update(128, dtype=torch.bfloat16, noisy=True),
}
