"""The largest inputs of each layer while a text runs through the model: what input scales are made of."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from nvfp4_kernels.autograd.experts import sorted_rows
from nvfp4_kernels.autograd.plain import dense
from nvfp4_kernels.formats import e2m1, e4m3
from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.nn.moe import Experts
from nvfp4_kernels.nn.quantized import QuantizedExperts
from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ops.relu2.op import relu2
from nvfp4_kernels.ptq.evaluate import windows

KEYS_VALUES = (".k_proj", ".v_proj")
DIVISOR = {"nvfp4": e4m3.MAX * e2m1.MAX, "fp8": e4m3.MAX}  # what an input scale maps the largest input to


class Amaxes(dict):
    """name of a target -> the largest magnitude of its inputs, fp32 [] or [experts].

    tokens: rows that each has seen. keys_values: name of a k_proj or v_proj -> the largest magnitude of its outputs.
    """

    def __init__(self):
        super().__init__()
        self.tokens: dict[str, Tensor] = {}
        self.keys_values: dict[str, Tensor] = {}

    def input_scale(self, name: str, form: str) -> Tensor | None:
        """amax / (6 * 448) for nvfp4, amax / 448 for fp8; None for formats without. What saw nothing but zeros gets 1.

        An expert without tokens has the largest amax of its stack: a scale too large loses little, one too small clips.
        Raises ValueError for a layer that the text never reached.
        """
        if form not in DIVISOR:
            return None
        allowed = (
            "windows of 2 tokens at least: multi-token prediction looks one ahead (do: a longer text, or --length)"
        )
        require(name in self, "calibrate", f"no input of {name}", allowed)
        amax, tokens = self[name], self.tokens[name]
        amax = torch.where(tokens > 0, amax, amax.max())
        return torch.where(amax > 0, amax / DIVISOR[form], 1.0)

    def unseen(self) -> dict[str, int]:
        """Stacks of experts some of which got no token, and how many."""
        idle = {name: int((tokens == 0).sum()) for name, tokens in self.tokens.items() if tokens.dim()}
        return {name: count for name, count in idle.items() if count}

    def cache_scale(self, name: str) -> Tensor:
        """By which an FP8 cache divides the keys or values that `name` makes."""
        amax = self.keys_values[name]
        return torch.where(amax > 0, amax / e4m3.MAX, 1.0)

    def check(self) -> None:
        """Raises ValueError naming the layer that was given a NaN or an infinity."""
        for name, amax in self.items():
            finite = bool(torch.isfinite(amax).all())
            require(finite, "calibrate", f"NaN or infinity as input of {name}", "finite activations")

    def see(self, name: str, x: Tensor, size: int = -1, expert: int | None = None) -> None:
        """Take in inputs [..., in] of a linear layer, or of one expert of `size`."""
        if name not in self:
            shape = () if expert is None else (size,)
            self[name] = torch.zeros(shape, dtype=torch.float32, device=x.device)
            self.tokens[name] = torch.zeros(shape, dtype=torch.int64, device=x.device)
        at = ... if expert is None else expert
        largest = x.detach().abs().amax().float()
        self[name][at] = torch.maximum(self[name][at], largest)  # a NaN stays one
        self.tokens[name][at] += x.numel() // x.shape[-1]


@contextlib.contextmanager
def experts_as_modules(model: nn.Module) -> Iterator[None]:
    """Inside, every layer of experts calls its `experts` module, whose hooks then run, and not the one op for all of it."""
    found = [module for module in model.modules() if isinstance(module, (Experts, QuantizedExperts))]
    for module in found:
        module.stacks = lambda: None
    try:
        yield
    finally:
        for module in found:
            del module.stacks


@contextlib.contextmanager
def observe(model: nn.Module) -> Iterator[Amaxes]:
    """Records the inputs of every linear layer and every expert, and attention's keys and values, while it is open."""
    amaxes, handles = Amaxes(), []

    def before_linear(name: str):
        return lambda module, args: amaxes.see(name, args[0]) if args[0].numel() else None

    def before_experts(name: str):
        def hook(module: Experts, args: tuple) -> None:
            x, offsets = sorted_rows(*args[:2])
            weights = (*args, None)[2]
            sizes = offsets.diff().tolist()
            shares = [None] * len(sizes) if weights is None else weights.split(sizes)
            for e, (rows, share) in enumerate(zip(x.split(sizes), shares, strict=True)):
                if len(rows):
                    # What passes between the two matrices is worked out a second time: the module keeps it to itself.
                    inner = relu2(dense(rows, module.up_proj[e].to(rows.dtype)), share)
                    amaxes.see(f"{name}.up_proj", rows, len(sizes), e)
                    amaxes.see(f"{name}.down_proj", inner, len(sizes), e)

        return hook

    def after_projection(name: str):
        def hook(module: Linear, args: tuple, y: Tensor) -> None:
            largest = y.detach().abs().amax().float() if y.numel() else y.new_zeros(()).float()
            amaxes.keys_values[name] = torch.maximum(amaxes.keys_values.get(name, largest), largest)

        return hook

    for name, module in model.named_modules():
        if name.endswith(KEYS_VALUES):
            handles.append(module.register_forward_hook(after_projection(name)))
        if isinstance(module, (Linear, Experts)):
            make = before_linear if isinstance(module, Linear) else before_experts
            handles.append(module.register_forward_pre_hook(make(name)))
    try:
        with experts_as_modules(model):
            yield amaxes
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def calibrate(model: nn.Module, ids: np.ndarray, length: int) -> Amaxes:
    """The amaxes of all layers over `ids`, in windows of `length` tokens; the model is put into eval mode and back.

    Raises ValueError naming the layer that was given a NaN or an infinity.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with observe(model) as amaxes:
            for rows, _ in windows(ids, min(length, len(ids) - 1), model.config.vocab_size):
                ids = rows.to(device)
                hidden = model.hidden(ids)
                model.lm_head(hidden)
                if model.mtp is not None and ids.shape[1] > 1:
                    model.mtp(hidden[:, :-1], model.embed(ids[:, 1:]))
    finally:
        model.train(training)
    amaxes.check()
    return amaxes
