"""A call of an op, with inputs that are the same on every machine."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nvfp4_kernels.formats.tensor import QuantizedTensor

Inputs = dict[str, object]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One call. make(): inputs on the CPU, the same each time. run(**inputs): the outputs, by name.

    tolerance: the largest relative L2 error of an output against the reference backend's; None: bit for bit.
    """

    op: str
    name: str
    make: Callable[[], Inputs]
    run: Callable[..., dict[str, Tensor | QuantizedTensor]]
    tolerance: float | None = None


def drawn(*shape: int, dtype: torch.dtype = FP32, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normal values, the same on every machine."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def with_gradients(op: Callable, *names: str, dy: Tensor, **given) -> dict:
    """y and the gradients of the named inputs."""
    leaves = {name: given[name].detach().requires_grad_() for name in names if given[name] is not None}
    with torch.enable_grad():
        y = op(**given | leaves)
        gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
