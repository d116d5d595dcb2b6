"""Errors in one form, "argument: got ...; allowed: ...", for op.py files, where every check of the ops is made."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def require(ok: bool, argument: str, got: object, allowed: str, error: type[Exception] = ValueError) -> None:
    """Raise `error` unless `ok`."""
    if not ok:
        raise error(f"{argument}: got {got}; allowed: {allowed}")


def float_tensor(argument: str, x: object) -> None:
    """`x` must be a bf16, fp16 or fp32 tensor in plain strided memory."""
    require(isinstance(x, Tensor), argument, type(x).__name__, "a torch.Tensor", TypeError)
    require(x.dtype in FLOATS, argument, x.dtype, "bfloat16, float16, float32", TypeError)
    strided(argument, x)


def strided(argument: str, x: object) -> None:
    """`x` must be a tensor in plain strided memory."""
    require(isinstance(x, Tensor), argument, type(x).__name__, "a torch.Tensor", TypeError)
    if not torch.compiler.is_compiling():  # dynamo cannot trace a layout inside a backward; eager has checked before
        require(x.layout == torch.strided, argument, x.layout, "a strided tensor", TypeError)


def floating_point(argument: str, x: object) -> None:
    """`x` must be a bf16, fp16, fp32 or fp64 tensor in plain strided memory."""
    require(isinstance(x, Tensor), argument, type(x).__name__, "a floating-point tensor", TypeError)
    require(x.is_floating_point(), argument, x.dtype, "a floating-point tensor", TypeError)
    require(x.itemsize > 1, argument, x.dtype, "bfloat16, float16, float32, float64", TypeError)
    strided(argument, x)


def float_operand(argument: str, x: object, shape: Sequence[int], device: torch.device, optional: bool = False) -> None:
    """`x` must be a floating-point tensor of this shape on this device, or None where it is `optional`."""
    if x is None and optional:
        return
    floating_point(argument, x)
    if tuple(x.shape) != tuple(shape):  # no words for what is right: dynamo has none for a size that varies
        require(False, argument, f"shape {list(x.shape)}", str(list(shape)))
    same_device(argument, x, device)


def integer(argument: str, value: object) -> None:
    """`value` must be an int, or what stands for one while a graph is captured."""
    require(isinstance(value, (int, torch.SymInt)), argument, type(value).__name__, "an int", TypeError)


def number(argument: str, value: object, least: float | None = None) -> None:
    """`value` must be a number, of at least `least`."""
    known = isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) or hasattr(value, "__float__")
    require(known, argument, type(value).__name__, "a number", TypeError)
    if least is not None and not value >= least:
        require(False, argument, value, f"at least {least}")


def integers(argument: str, x: object) -> None:
    """`x` must be a tensor of int32 or int64."""
    require(isinstance(x, Tensor), argument, type(x).__name__, "an int32 or int64 tensor", TypeError)
    require(x.dtype in (torch.int32, torch.int64), argument, x.dtype, "int32, int64", TypeError)


def same_device(argument: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:  # no words are put together for what is right
        require(False, argument, f"device {x.device}", f"{device}, where the other operands are")


def index_tensor(argument: str, index: Tensor, device: torch.device) -> None:
    """`index` must be an int64 vector in order in memory."""
    require(isinstance(index, Tensor), argument, type(index).__name__, "an int64 tensor", TypeError)
    require(index.dtype == torch.int64, argument, index.dtype, "int64", TypeError)
    require(index.dim() == 1, argument, f"shape {list(index.shape)}", "one dimension")
    require(index.is_contiguous(), argument, f"strides {index.stride()}", "contiguous memory")
    same_device(argument, index, device)


def rows_within(rows: Tensor | None, count: int) -> None:
    """`rows` must name rows of `count` ones: on the CPU alone, for a GPU would have to report to the host."""
    if rows is not None and rows.device.type == "cpu" and rows.numel():
        low, high = (int(x) for x in rows.aminmax())
        require(0 <= low and high < count, "rows", f"{low} to {high}", f"0 to {count - 1}, the rows there are")


def boundaries(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """`cu_seqlens` read to the host; its values must ascend from 0 to `tokens`."""
    bounds = cu_seqlens.tolist()
    require(
        bounds[0] == 0 and bounds[-1] == tokens and bounds == sorted(bounds),
        "cu_seqlens",
        bounds if len(bounds) < 10 else "other bounds",
        f"ascending from 0 to {tokens}",
    )
    return bounds


def no_grad(argument: str, x: Tensor, instead: str) -> None:
    """`x` must not ask for a gradient that the op would silently drop."""
    wanted = torch.is_grad_enabled() and not torch.compiler.is_compiling() and x.requires_grad
    require(not wanted, argument, "a tensor that requires grad", f"no grad here (detach it); {instead}", RuntimeError)
