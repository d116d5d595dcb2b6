"""The inputs of quantized layers rounded too, as hardware does that multiplies FP4 by FP4 or FP8 by FP8.

The modules of nn.quantized read their inputs as they come (W4A16, W8A16). Inside `quantized_activations` each first goes
through the format that its layer's input scale stands for: what a checkpoint predicts when it is served so, and the test
of its calibration.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nvfp4_kernels.autograd.experts import sorted_rows
from nvfp4_kernels.formats import e4m3
from nvfp4_kernels.nn.quantized import NVFP4Weight, QuantizedWeight
from nvfp4_kernels.ops.quantize.op import quantize
from nvfp4_kernels.ptq.calibrate import DIVISOR, experts_as_modules


@contextlib.contextmanager
def quantized_activations(model: nn.Module) -> Iterator[int]:
    """Rounds the inputs of every quantized layer with an input scale; gives how many there are."""

    def before(layer: QuantizedWeight, args: tuple) -> tuple:
        round_trip = nvfp4 if isinstance(layer, NVFP4Weight) else fp8
        if layer.experts is None:
            return (round_trip(args[0], layer.input_scale),)
        x, offsets = sorted_rows(*args)
        parts = zip(x.split(offsets.diff().tolist()), layer.input_scale, strict=True)
        return torch.cat([round_trip(rows, scale) for rows, scale in parts]), offsets

    layers = [m for m in model.modules() if isinstance(m, QuantizedWeight) and m.input_scale is not None]
    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    try:
        with experts_as_modules(model):
            yield len(layers)
    finally:
        for handle in handles:
            handle.remove()


def nvfp4(x: Tensor, input_scale: Tensor) -> Tensor:
    """x [..., cols] under the global scale `input_scale`, the scale of each block of 16 by its largest value; in x's dtype.

    NaN everywhere if x has a NaN or an infinity.
    """
    x = x.detach()
    amax = torch.where(x.isfinite().all(), input_scale * DIVISOR["nvfp4"], torch.nan)
    return quantize(x.float(), amax=amax).dequantize().to(x.dtype)


def fp8(x: Tensor, input_scale: Tensor) -> Tensor:
    """x rounded to E4M3 under one scale, saturating; in x's dtype."""
    return (e4m3.decode(e4m3.encode(x.float() / input_scale)) * input_scale).to(x.dtype)
