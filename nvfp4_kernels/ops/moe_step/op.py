"""moe_step: a mixture-of-experts block at inference, from its input to its output, in one call."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack, rows_of
from nvfp4_kernels.ops._check import float_operand, float_tensor, no_grad, require
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._library import register, unobserved
from nvfp4_kernels.ops.expert_mlp.op import check_matrices, check_shape
from nvfp4_kernels.ops.grouped_matmul.op import from_parts, plain_parts
from nvfp4_kernels.ops.route.op import check_choice

MATRICES = "up", "down", "fc1", "fc2", "shared_up", "shared_down"
Matrices = tuple[Stack | None, ...]  # in that order


def moe_step(
    x: Tensor,
    router: Tensor,
    bias: Tensor | None,
    up: Tensor | Stack,
    down: Tensor | Stack,
    top_k: int,
    scale: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    normalize: bool = True,
    *,
    fc1: Tensor | Stack | None = None,
    fc2: Tensor | Stack | None = None,
    shared_up: Tensor | Stack | None = None,
    shared_down: Tensor | Stack | None = None,
) -> Tensor:
    """shared_down relu2(shared_up x) + fc2 expert_mlp(fc1 x, route(router_logits(x))): the bits of these ops and of products
    summed in fp32, each rounded to x's dtype, for the price of one call.

    x: bf16, fp16 or fp32 [tokens, hidden]. router: floating point [experts, hidden], read as fp32; bias: [experts] or None.
    up, down: [experts, width, size] and [experts, size, width], plain, NVFP4 or FP8, where size is hidden without fc1 and fc2.
    fc1, fc2: [1, size, hidden] and [1, hidden, size], as up, or both None. shared_up, shared_down: [1, shared, hidden] and
        [1, hidden, shared], or both None.
    top_k, scale, n_group, topk_group, normalize: as nk.route.
    Returns [tokens, hidden] of x's dtype. Not differentiable. Raises TypeError, ValueError or RuntimeError naming the argument.
    """
    float_tensor("x", x)
    no_grad("x", x, "the ops of which it consists differentiate")
    if x.dim() != 2:  # no words are put together for what is right
        require(False, "x", f"shape {list(x.shape)}", "[tokens, hidden]")
    matrices = check(x.shape[1], x.device, router, bias, up, down, fc1, fc2, shared_up, shared_down)
    choice = top_k, float(scale), n_group, topk_group, normalize
    check_choice(router.shape[0], top_k, n_group, topk_group)
    if unobserved(x):
        return _serve(x, router, bias, matrices, choice)
    parts = [part for m in matrices for part in ((None,) * 3 if m is None else plain_parts(m))]
    return torch.ops.nvfp4.moe_step(x, router, bias, *parts, *choice)


def check(hidden: int, device: torch.device, router: Tensor, bias: Tensor | None, *given) -> Matrices:
    """The matrices as stacks; raises where they do not fit one another, or tokens of so many features on this device."""
    float_operand("router", router, (router.shape[0], hidden), device)
    float_operand("bias", bias, (router.shape[0],), device, optional=True)
    found = tuple(m if m is None or isinstance(m, Stack) else Stack(m) for m in given)
    for first in (2, 4):
        name, other = MATRICES[first : first + 2]
        require(
            (found[first] is None) == (found[first + 1] is None), other, "one of two", f"{name} and {other}, or neither"
        )
    for name, stack in zip(MATRICES, found, strict=True):
        if stack is not None:
            check_matrices(name, stack, device)
    up, _, fc1, _, shared, _ = found
    size, width = hidden if fc1 is None else rows_of(fc1), rows_of(up)
    inner = 0 if shared is None else rows_of(shared)
    wanted = (width, size), (size, width), (size, hidden), (hidden, size), (inner, hidden), (hidden, inner)
    for i, (name, stack) in enumerate(zip(MATRICES, found, strict=True)):
        if stack is not None:
            check_shape(name, stack, (router.shape[0] if i < 2 else 1, *wanted[i]))
    return found


def _run(x: Tensor, router: Tensor, bias: Tensor | None, *rest) -> Tensor:
    parts, choice = rest[:18], rest[18:]
    matrices = tuple(None if parts[i] is None else from_parts(*parts[i : i + 3]) for i in range(0, 18, 3))
    return _serve(x, router, bias, matrices, choice)


def _serve(x: Tensor, router: Tensor, bias: Tensor | None, matrices: Matrices, choice: tuple) -> Tensor:
    return select("moe_step", x, router, bias, matrices, choice).run(x, router, bias, matrices, choice)


def _fake(x: Tensor, *arguments) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_STACKS = ", ".join(f"Tensor? {name}, Tensor? {name}_scales, Tensor? {name}_global" for name in MATRICES)
register(
    f"moe_step(Tensor x, Tensor router, Tensor? bias, {_STACKS}, int top_k, float scale, int n_group, int topk_group, "
    "bool normalize) -> Tensor",
    _run,
    _fake,
)
