"""The health of quantization, measured on one step: what each operand of each layer lost when it was quantized.

    with observe(model) as health:
        loss = model.loss(...); loss.backward()
    health.worst()

The training step itself is untouched: the operands that pass by are quantized once more, on a sample of their rows and
with noise of their own. The sample holds the row of the largest value, so its global scale is the tensor's.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from nvfp4_kernels.autograd.experts import sorted_rows
from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.nn.moe import Experts
from nvfp4_kernels.ops.dequantize.op import dequantize
from nvfp4_kernels.ops.hadamard.op import hadamard
from nvfp4_kernels.ops.quantize.op import quantize

NOISELESS = 200.0  # dB; what an operand without any error is given, for JSON has no infinity


@dataclass(frozen=True)
class OperandHealth:
    """decibels: signal over quantization noise (None for a tensor with NaN or infinity, or nothing but zeros).
    clipped: share of values that rounded down from beyond the largest code's own range (over 7/6 of it: ordinary
    rounding explains the rest; a healthy NVFP4 tensor has none). flushed: share of nonzero values that became zero.
    non_finite: NaN and infinities in the whole tensor."""

    decibels: float | None
    clipped: float
    flushed: float
    non_finite: int


@dataclass
class Health:
    """operands: (layer, "x" | "w" | "dy") -> OperandHealth."""

    operands: dict[tuple[str, str], OperandHealth] = field(default_factory=dict)

    def worst(self) -> tuple[str, str, float] | None:
        """(layer, operand, dB) of the smallest signal-to-noise ratio; None where nothing is quantized."""
        known = [
            (h.decibels, layer, operand) for (layer, operand), h in self.operands.items() if h.decibels is not None
        ]
        return min(known)[1:] + (min(known)[0],) if known else None

    def summary(self) -> dict[str, float | str]:
        """The worst layer and the means over all operands, as flat values for a log."""
        worst, count = self.worst(), max(len(self.operands), 1)
        if worst is None:
            return {}
        decibels = [h.decibels for h in self.operands.values() if h.decibels is not None]
        return {
            "worst_layer": worst[0], "worst_operand": worst[1], "worst_db": worst[2],
            "mean_db": sum(decibels) / len(decibels),
            "clipped": sum(h.clipped for h in self.operands.values()) / count,
            "flushed": sum(h.flushed for h in self.operands.values()) / count,
            "non_finite": sum(h.non_finite for h in self.operands.values()),
        }  # fmt: skip


def sample_rows(x: Tensor, rows: int) -> Tensor:
    """About `rows` rows of x [rows, cols] in whole groups of 16 (a 16x16 tile keeps its scale), with the largest value."""
    if x.shape[0] <= rows:
        return x
    groups = -(-x.shape[0] // 16)
    largest = int(torch.linalg.vector_norm(x, math.inf, dim=1).argmax()) // 16
    chosen = torch.linspace(0, groups - 1, max(rows // 16, 1)).long().tolist()
    index = torch.cat([torch.arange(g * 16, min(g * 16 + 16, x.shape[0])) for g in sorted({*chosen, largest})])
    return x[index.to(x.device)]


@torch.no_grad()
def measure(x: Tensor, spec: QuantSpec, rows: int = 256) -> OperandHealth:
    """What `spec` does to x [..., cols], on about `rows` of its rows."""
    x = x.detach().reshape(-1, x.shape[-1])
    non_finite = int((~torch.isfinite(x)).sum())
    if non_finite or x.numel() == 0:
        return OperandHealth(None, 0.0, 0.0, non_finite)
    x = sample_rows(x, rows)
    q = quantize(x, spec, seed=0)
    source = (x if spec.hadamard is None else hadamard(x, spec.hadamard)).float()
    decoded = dequantize(q)
    signal, noise = (
        float(source.square().sum(dtype=torch.float64)),
        float((source - decoded).square_().sum(dtype=torch.float64)),
    )
    nonzero = source != 0
    top = _at_top_code(q.codes, decoded.shape[1]) & (source.abs() > decoded.abs() * (7 / 6))
    decibels = None if signal == 0 else NOISELESS if noise == 0 else min(10 * math.log10(signal / noise), NOISELESS)
    return OperandHealth(
        decibels, float(top.float().mean()), float((nonzero & (decoded == 0)).sum() / nonzero.sum().clamp(min=1)), 0
    )


def _at_top_code(codes: Tensor, cols: int) -> Tensor:
    if codes.dtype == torch.uint8:  # two E2M1 codes a byte, low nibble first; 7 is 6.0
        codes = torch.stack([codes & 7, codes >> 4 & 7], dim=-1).flatten(-2)
        return codes[:, :cols] == 7
    return codes.float()[:, :cols].abs() == 448


@contextlib.contextmanager
def observe(model: nn.Module, rows: int = 256) -> Iterator[Health]:
    """Measures every quantized operand of the forward and backward passes run inside; each once, at its first use.

    Observed are the Linear layers, and of each stack of experts the one with the most tokens.
    """
    health, handles = Health(), []

    def record(name: str, operand: str, x: Tensor, spec: QuantSpec | None) -> None:
        # Once each: a checkpointed layer runs its forward twice, an MTP block once for every depth.
        if spec is not None and (name, operand) not in health.operands:
            health.operands[name, operand] = measure(x, spec, rows)

    for name, module in model.named_modules():
        if isinstance(module, Linear):
            handles.append(module.register_forward_hook(partial(_after_linear, record, name)))
        elif isinstance(module, Experts):
            handles.append(module.register_forward_hook(partial(_after_experts, record, name)))
    try:
        yield health
    finally:
        for handle in handles:
            handle.remove()


def _after_linear(record, name: str, module: Linear, args: tuple, y: Tensor) -> None:
    recipe = module.recipe
    record(name, "x", args[0], recipe.fprop_x)
    record(name, "w", module.weight, recipe.fprop_w)
    if y.requires_grad and recipe.dgrad_dy is not None:
        y.register_hook(lambda dy: record(name, "dy", dy, recipe.dgrad_dy))


def _after_experts(record, name: str, module: Experts, args: tuple, y: Tensor) -> None:
    """What passes between the two matrices is worked out again for the busiest expert, in high precision."""
    weights = (*args, None)[2]
    x, offsets = sorted_rows(args[0].detach(), args[1])
    sizes = offsets.diff().tolist()
    busiest = max(range(len(sizes)), key=sizes.__getitem__)
    start = sum(sizes[:busiest])
    mine = slice(start, start + sizes[busiest])
    with torch.no_grad():
        up, down = (matrix[busiest].to(x.dtype) for matrix in (module.up_proj, module.down_proj))
        above = (x[mine] @ up.t()).relu()
        scale = 1.0 if weights is None else weights[mine, None].to(x.dtype)
    recipes = {part: (f"{name}.{part}", module.recipes[part]) for part in ("up_proj", "down_proj")}
    for part, operand, matrix in (("up_proj", x[mine], up), ("down_proj", above.square() * scale, down)):
        label, recipe = recipes[part]
        record(label, "x", operand, recipe.fprop_x)
        record(label, "w", matrix, recipe.fprop_w)

    def backward(dy: Tensor) -> None:
        dh = (dy[mine] @ down) * (2 * above * scale)
        for part, gradient in (("down_proj", dy[mine]), ("up_proj", dh)):
            label, recipe = recipes[part]
            record(label, "dy", gradient, recipe.dgrad_dy)

    if y.requires_grad and any(recipe.dgrad_dy is not None for _, recipe in recipes.values()):
        y.register_hook(backward)
