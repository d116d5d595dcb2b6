"""router_logits: a router's product with its input in fp32, of which backward keeps the input as it came."""

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import floating_point, require, same_device
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._library import register_differentiable, unobserved


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in fp32 (fp64 for fp64 x): float32 [tokens, experts], differentiable in both.

    x: floating point [tokens, hidden]; its gradient has its dtype, rounded once. weight: floating point [experts, hidden].
    Keeps x itself for backward where `F.linear(x.float(), weight)` keeps a copy in fp32, twice the bytes of a bf16 x.
    On a CPU a token's logits do not depend on the tokens beside it.
    Raises TypeError or ValueError naming the argument.
    """
    floating_point("x", x)
    floating_point("weight", weight)
    if x.dim() != 2:  # no words are put together for what is right
        require(False, "x", f"shape {list(x.shape)}", "[tokens, hidden]")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        require(False, "weight", f"shape {list(weight.shape)}", f"[experts, {x.shape[1]}], x's width")
    same_device("weight", weight, x.device)
    return (_run if unobserved(x) else torch.ops.nvfp4.router_logits)(x, weight)


def _run(x: Tensor, weight: Tensor) -> Tensor:
    return select("router_logits", x, weight).run(x, weight)


def _backward(dlogits: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return select("router_logits", x, weight).backward(dlogits, x, weight)


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


register_differentiable("router_logits", "Tensor x, Tensor weight", 1, _run, _fake, _backward, 2)
