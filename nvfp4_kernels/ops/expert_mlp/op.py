"""expert_mlp: what a mixture's experts make of tokens at inference, from the routing to the weighted sum, in one call."""

import torch
from torch import Tensor

from nvfp4_kernels.formats.groups import Stack, is_packed, rows_of
from nvfp4_kernels.formats.layout import ceil_to
from nvfp4_kernels.ops._check import float_tensor, no_grad, require, same_device
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._library import register, unobserved
from nvfp4_kernels.ops.grouped_matmul.op import (
    check_stack,
    from_parts,
    length,
    plain_parts,
    reads_packed,
    run_of,
    unpacked,
)
from nvfp4_kernels.ops.route.op import Routing, check_routing


def expert_mlp(x: Tensor, routing: Routing, up: Tensor | Stack, down: Tensor | Stack) -> Tensor:
    """y[token] = sum over its choices of weight * down[e] @ relu(up[e] @ x[token])^2, for the expert e of each choice.

    x: bf16, fp16 or fp32 [tokens, size]. up: [experts, width, size], down: [experts, size, width], plain, NVFP4 or FP8; packed
        NVFP4 is read in place by CUDA's kernels for bf16, and unpacked for all others.
    Returns [tokens, size] of x's dtype. Sums run in fp32; the hidden values are rounded to x's dtype once, after the square.
    No gradients: nk.experts has them. Raises TypeError, ValueError or RuntimeError naming the argument.
    """
    float_tensor("x", x)
    no_grad("x", x, "nk.experts differentiates")
    check_routing(routing)
    no_grad("routing", routing.weights, "nk.experts differentiates")
    tokens = routing.indices.shape[0]
    if x.dim() != 2 or x.shape[0] != tokens:  # no words are put together for what is right, here and below
        require(False, "x", f"shape {list(x.shape)}", f"[{tokens}, size], as routed")
    same_device("routing", routing.order, x.device)
    stacks, experts = [], routing.offsets.shape[0] - 1
    for name, given in (("up", up), ("down", down)):
        stack = given if isinstance(given, Stack) else Stack(given)
        check_matrices(name, stack, x.device)
        size, width = x.shape[1], rows_of(stacks[0]) if stacks else rows_of(stack)
        check_shape(name, stack, (experts, size, width) if stacks else (experts, width, size))
        stacks.append(stack)
    slots = routing.weights, routing.offsets, routing.inverse, routing.order
    if unobserved(x):
        return _serve(x, slots, *stacks)
    return torch.ops.nvfp4.expert_mlp(x, *slots, *plain_parts(stacks[0]), *plain_parts(stacks[1]))


def check_matrices(name: str, stack: Stack, device: torch.device) -> None:
    """A stack of matrices as stored, of a type that the kernels at inference read."""
    allowed = "bfloat16, float16, float32, NVFP4, FP8"
    require(
        isinstance(stack.values, Tensor),
        name,
        type(stack.values).__name__,
        f"a Stack or a tensor: {allowed}",
        TypeError,
    )
    require(stack.values.dtype != torch.float64, name, "float64", allowed, TypeError)
    check_stack(name, stack, device)
    require(not stack.turned, name, "a stack of transposes", "the matrices as stored")
    if stack.values.dim() == 2:
        require(False, name, "2 dimensions", "3, [experts, out, in]")


def check_shape(name: str, stack: Stack, wanted: tuple[int, int, int]) -> None:
    shape = stack.values.shape[0], rows_of(stack), length(stack)
    fits = shape == (*wanted[:2], ceil_to(wanted[2], run_of(stack)) if is_packed(stack) else wanted[2])
    if not fits:
        require(False, name, f"shape {list(shape)}", f"{list(wanted)}")


def _run(x: Tensor, weights: Tensor, offsets: Tensor, inverse: Tensor, order: Tensor, *parts: Tensor | None) -> Tensor:
    slots = weights.detach(), offsets, inverse, order
    return _serve(x, slots, from_parts(*parts[:3]), from_parts(*parts[3:]))


def _serve(x: Tensor, slots: tuple[Tensor, ...], up: Stack, down: Stack) -> Tensor:
    if (is_packed(up) or is_packed(down)) and not reads_packed("expert_mlp", x, *slots, up, down):
        up, down = unpacked(up, x.shape[1]), unpacked(down, rows_of(up))
    return select("expert_mlp", x, *slots, up, down).run(x, *slots, up, down)


def _fake(x: Tensor, *arguments) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_STACKS = ", ".join(f"Tensor {name}, Tensor? {name}_scales, Tensor? {name}_global" for name in ("up", "down"))
register(
    f"expert_mlp(Tensor x, Tensor weights, Tensor offsets, Tensor inverse, Tensor order, {_STACKS}) -> Tensor",
    _run, _fake,
)  # fmt: skip
