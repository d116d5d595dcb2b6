"""Operands through save_for_backward: quantized ones as their parts, so that autograd owns (and can offload) each."""

from dataclasses import replace

from torch import Tensor

from nvfp4_kernels.formats.tensor import MXFP8Tensor, NVFP4Tensor

Operand = NVFP4Tensor | MXFP8Tensor | Tensor


def save(ctx, *operands: Operand) -> None:
    """Save operands for backward; `saved` gives them back in order."""
    tensors, ctx.operands = [], []
    for operand in operands:
        parts = {"": operand} if isinstance(operand, Tensor) else operand.tensors()
        shell = (
            None if isinstance(operand, Tensor) else (type(operand), operand.shape, getattr(operand, "hadamard", None))
        )
        ctx.operands.append((shell, tuple(parts)))
        tensors.extend(parts.values())
    ctx.save_for_backward(*tensors)


def saved(ctx) -> list[Operand]:
    tensors, operands = list(ctx.saved_tensors), []
    for shell, names in ctx.operands:
        parts = {name: tensors.pop(0) for name in names}
        if shell is None:
            operands.append(parts[""])
            continue
        kind, shape, hadamard = shell
        operand = kind(**parts, shape=shape)
        operands.append(operand if hadamard is None else replace(operand, hadamard=hadamard))
    return operands
