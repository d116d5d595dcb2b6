"""The choice and its gradient for 8,192 tokens, as in Nano and Super, and with limits on the groups, as in DeepSeek-V3."""

import torch

from nvfp4_kernels.ops.route import triton


def both_ways(tokens: int, experts: int, top_k: int, groups: int, top_groups: int):
    logits, bias = torch.empty(tokens, experts, device="meta"), torch.empty(experts, device="meta")
    options = (bias, top_k, 2.5, groups, top_groups, True)
    triton.run(logits, *options)
    triton.backward(torch.empty(tokens, top_k, device="meta"), logits, *options)


CASES = {
    "Nano": lambda: both_ways(8192, 128, 6, 1, 1),
    "Super": lambda: both_ways(8192, 512, 22, 1, 1),
    "groups": lambda: both_ways(8192, 256, 8, 8, 4),
}
