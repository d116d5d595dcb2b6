"""Where the first NaN or infinity of a step arose: run the step again inside `tripwire` and read what it caught."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Origin:
    """tensor: x (the input), w or a parameter's name, y (the output, from finite x and w), dy (the gradient coming into
    the output), dw (the weight's gradient, from finite dy)."""

    layer: str
    tensor: str

    def __str__(self) -> str:
        return f"{self.layer or 'model'}, {self.tensor}"


@dataclass
class Caught:
    origin: Origin | None = None

    def check(self, layer: str, tensor: str, value) -> None:
        if self.origin is None and isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach()  # a checkpointed layer would save what isfinite does, and not when it runs again
            if hasattr(value, "to_local"):  # a shard: other ranks do not ask now
                value = value.to_local()
            if not bool(torch.isfinite(value).all()):
                self.origin = Origin(layer, tensor)


@contextlib.contextmanager
def tripwire(model: nn.Module) -> Iterator[Caught]:
    """Watches every module of `model`; in the order of execution, the first bad tensor wins.

    Inside, clear the gradients, then run forward and backward. On leaving, gradients of parameters are looked at too.
    """
    caught, handles = Caught(), []

    def tensors(values) -> list[Tensor]:
        values = values if isinstance(values, (tuple, list)) else (values,)
        return [v for v in values if isinstance(v, Tensor)]

    def watch(name: str, module: nn.Module) -> None:
        def before(module, args):
            for value in args:
                caught.check(name, "x", value)
            for key, parameter in module.named_parameters(recurse=False):
                caught.check(name, "w" if key == "weight" else key, parameter)

        def after(module, args, y):
            for value in tensors(y):
                caught.check(name, "y", value)
                if value.requires_grad:
                    value.register_hook(lambda dy: caught.check(name, "dy", dy))

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))

    for name, module in model.named_modules():
        watch(name, module)
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
    for name, parameter in reversed(list(model.named_parameters())):  # about the order in which backward makes them
        layer, _, key = name.rpartition(".")
        caught.check(layer, "dw" if key == "weight" else f"d{key}", parameter.grad)
