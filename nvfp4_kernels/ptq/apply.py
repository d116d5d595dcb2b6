"""Puts quantized layers in the place of a model's own, one after the other, and tells what each lost."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nvfp4_kernels.nn.quantized import FP8Weight, NVFP4Weight, QuantizedExperts, QuantizedWeight
from nvfp4_kernels.ptq.calibrate import Amaxes
from nvfp4_kernels.ptq.formats import BITS, Target
from nvfp4_kernels.ptq.scales import quantize_fp8, quantize_nvfp4


@dataclass(frozen=True)
class Loss:
    """What quantizing one target cost. squared: the sum of squared errors, norm: that of squared weights; fp64 sums."""

    target: Target
    format: str
    squared: float
    norm: float

    @property
    def relative_error(self) -> float:
        """|W - quantized W| / |W|, Frobenius norms; 0 for a weight of zeros."""
        return (self.squared / self.norm) ** 0.5 if self.norm else 0.0

    @property
    def bits(self) -> float:
        return BITS[self.format]


@torch.no_grad()
def apply(
    model: nn.Module,
    found: Iterable[Target],
    chosen: Mapping[str, str],
    amaxes: Amaxes | None = None,
    search: str = "max",
    four_over_six: str | None = None,
) -> Iterator[Loss]:
    """Quantizes the targets `chosen` (name -> format) in place; yields what each cost as it is done, 0 for bf16.

    amaxes: of calibrate, for the input scales of nvfp4 and fp8; None leaves them out. search, four_over_six: as of
    ptq.scales. The weights that are replaced are freed layer by layer. Raises ValueError naming the layer.
    """
    waiting: dict[str, QuantizedWeight] = {}
    for target in found:
        form = chosen[target.name]
        if form == "bf16":
            yield Loss(target, form, 0.0, float(weight_of(model, target).double().square().sum()))
            continue
        layer, loss = quantize_target(model, target, form, amaxes, search, four_over_six)
        if target.experts is None:
            swap(model, target.name, layer)
        else:
            waiting[target.name] = layer
            stack = target.name.rpartition(".")[0]
            if len(pair := [waiting[n] for n in (f"{stack}.up_proj", f"{stack}.down_proj") if n in waiting]) == 2:
                swap(model, stack, QuantizedExperts(*pair))
                waiting.clear()
        yield loss


def quantize_target(
    model: nn.Module, target: Target, form: str, amaxes: Amaxes | None, search: str, four_over_six: str | None
) -> tuple[QuantizedWeight, Loss]:
    """The layer that would stand for `target`, and what it loses; the model stays as it is."""
    weight = weight_of(model, target)
    input_scale = None if amaxes is None else amaxes.input_scale(target.name, form)
    bias = None if target.experts else model.get_submodule(target.name).bias
    matrices = weight.unbind() if target.experts else [weight]
    return quantize_matrices(target, matrices, form, search, four_over_six, bias, input_scale)


@torch.no_grad()
def quantize_matrices(
    target: Target,
    matrices: Iterable[Tensor],
    form: str,
    search: str,
    four_over_six: str | None,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> tuple[QuantizedWeight, Loss]:
    """The same of a target's matrices, of which one at a time is needed."""
    squared = norm = 0.0
    parts = []
    for matrix in matrices:
        part, decoded = _quantize(target.name, matrix, form, search, four_over_six)
        squared += float((decoded - matrix.float()).square().sum(dtype=torch.float64))
        norm += float(matrix.float().square().sum(dtype=torch.float64))
        parts.append(part)
    if form == "fp8":
        codes, scales = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
        codes, scales = (codes, scales) if target.experts else (codes[0], scales[0])
        layer = FP8Weight.from_tensors(codes, scales, bias, input_scale)
    else:
        layer = NVFP4Weight.from_tensors(parts if target.experts else parts[0], bias, input_scale)
    return layer, Loss(target, form, squared, norm)


def weight_of(model: nn.Module, target: Target) -> Tensor:
    """[out, in], or [experts, out, in]."""
    owner, _, part = target.name.rpartition(".")
    return getattr(model.get_submodule(owner), part) if target.experts else model.get_submodule(target.name).weight


def swap(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Puts `module` where `name` points; returns what stood there."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    before = getattr(owner, leaf)
    setattr(owner, leaf, module.train(before.training))
    return before


def _quantize(name: str, matrix: Tensor, form: str, search: str, four_over_six: str | None):
    """(what the layer is made from, its values in fp32)."""
    try:
        if form == "fp8":
            codes, scale = quantize_fp8(matrix)
            return (codes, scale), codes.float() * scale
        quantized = quantize_nvfp4(matrix, search, four_over_six)
        return quantized, quantized.dequantize()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
