"""Operands through save_for_backward: quantized ones as their parts, so that autograd owns (and can offload) each."""

from dataclasses import replace

from torch import Tensor

from nvfp4_kernels.formats.groups import Columns, Stack
from nvfp4_kernels.formats.tensor import MXFP8Tensor, NVFP4Tensor

Operand = NVFP4Tensor | MXFP8Tensor | Tensor


def save(ctx, *operands: Operand | Stack | Columns | None) -> None:
    """Save operands for backward; `saved` gives them back in order."""
    tensors, ctx.operands = [], []
    for operand in operands:
        if operand is None:  # isinstance, not match: torch 2.10 traces no class patterns
            shell, parts = None, {}
        elif isinstance(operand, Tensor):
            shell, parts = None, {"": operand}
        elif isinstance(operand, (Stack, Columns)):
            parts = {name: part for name, part in operand._asdict().items() if isinstance(part, Tensor)}
            shell = operand._replace(**dict.fromkeys(parts))
        else:
            parts = operand.tensors()
            shell = type(operand), operand.shape, getattr(operand, "hadamard", None)
        ctx.operands.append((shell, tuple(parts)))
        tensors.extend(parts.values())
    ctx.save_for_backward(*tensors)


def saved(ctx) -> list[Operand | Stack | Columns | None]:
    tensors, operands = list(ctx.saved_tensors), []
    for shell, names in ctx.operands:
        parts = {name: tensors.pop(0) for name in names}
        if shell is None:
            operands.append(parts.get(""))
            continue
        if isinstance(shell, (Stack, Columns)):
            operands.append(shell._replace(**parts))
            continue
        kind, shape, hadamard = shell
        operand = kind(**parts, shape=shape)
        operands.append(operand if hadamard is None else replace(operand, hadamard=hadamard))
    return operands
