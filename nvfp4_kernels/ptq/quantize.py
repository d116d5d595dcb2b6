"""Post-training quantization from end to end: choose formats, calibrate, quantize in place, and report what it cost."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.nn.moe import Experts
from nvfp4_kernels.nn.quantized import QuantizedWeight
from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ptq import budget, formats
from nvfp4_kernels.ptq.activations import quantized_activations
from nvfp4_kernels.ptq.apply import Loss, apply
from nvfp4_kernels.ptq.budget import Cost
from nvfp4_kernels.ptq.calibrate import Amaxes, calibrate
from nvfp4_kernels.ptq.evaluate import Evaluation, Text, evaluate
from nvfp4_kernels.ptq.formats import NEEDS_INPUT_SCALE, Rules, Target

REPORT = "quantization_report.json"
Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much


@dataclass(frozen=True)
class Plan:
    """rules: patterns and formats; or bits: a budget, a weight on average, that measured costs are to meet.

    label: what to call it in the report. search, four_over_six: as of ptq.scales. kv_cache: whether the checkpoint is to say
    that keys and values are cached in FP8, with measured scales, which Engine's kv_dtype takes; evaluation caches nothing.
    """

    label: str
    rules: Rules | None = None
    bits: float | None = None
    search: str = "max"
    four_over_six: str | None = None
    kv_cache: bool = False

    @classmethod
    def of_recipe(
        cls, name: str, config: HybridConfig, search: str | None = None, four_over_six: str | None = None
    ) -> "Plan":
        """A published recipe; with `search` or `four_over_six`, with these in place of its own."""
        recipe = formats.get_recipe(name)
        if search is None and four_over_six is None:
            search, four_over_six = recipe.search, recipe.four_over_six
        return cls(name, recipe.rules(config), None, search or "max", four_over_six, True)


@dataclass(frozen=True)
class Report:
    """losses: of each target, in the order of the model. bytes: of all tensors, as tensor_bytes has them.
    before, after: of the model and of its quantized weights; served: with the inputs quantized too, where they have scales.
    costs: what a budget was shared out by. unseen: stacks of experts, some without a calibration token -> how many."""

    plan: Plan
    losses: tuple[Loss, ...]
    bytes_before: int
    bytes_after: int
    before: Evaluation | None = None
    after: Evaluation | None = None
    served: Evaluation | None = None
    costs: tuple[Cost, ...] = ()
    unseen: dict[str, int] | None = None
    calibration_tokens: int = 0

    @property
    def bits(self) -> float:
        """A weight, on average over the targets that the plan is about: all, or with a budget those of the backbone."""
        counted = [loss for loss in self.losses if self.plan.bits is None or _in_backbone(loss.target)]
        return formats.average_bits([x.target for x in counted], {x.target.name: x.format for x in counted})

    def to_dict(self) -> dict:
        plan = self.plan
        report = {
            "plan": plan.label, "search": plan.search, "four_over_six": plan.four_over_six, "bits_budget": plan.bits,
            "bits_a_weight": self.bits, "bytes_before": self.bytes_before, "bytes_after": self.bytes_after,
            "linears": formats.linears(*_assignment(self.losses)), "calibration_tokens": self.calibration_tokens,
            "experts_without_calibration_tokens": self.unseen or {},
            "layers": [
                {
                    "layer": loss.target.name, "weight": list(loss.target.shape), "experts": loss.target.experts,
                    "format": loss.format, "bits": loss.bits, "relative_error": loss.relative_error,
                }
                for loss in self.losses
            ],
        }  # fmt: skip
        if self.costs:
            report["sensitivity"] = [
                {"group": c.group.name, "format": c.format, "divergence": c.divergence, "loss": c.loss}
                for c in self.costs
            ]
        evaluations = {"before": self.before, "after": self.after, "inputs_quantized_too": self.served}
        return report | {name: got.to_dict() for name, got in evaluations.items() if got is not None}

    def save(self, folder: Path) -> None:
        (folder / REPORT).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def quantize_model(
    model: nn.Module,
    plan: Plan,
    calibration: Text | None = None,
    text: Text | None = None,
    length: int = 2048,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Quantizes `model` in place; its other matrices are rounded to config.dtype, as a checkpoint stores them.

    calibration: the text for input scales and for measured costs; needed where the plan has a budget, or a format with
        input scales. text: what perplexity is measured on, before and after; None for neither. length: tokens in a window.
    Raises ValueError naming the argument or the layer.
    """
    require_high_precision(model)
    model.set_recipe("bf16")
    found = formats.targets(model)
    chosen = None if plan.rules is None else formats.assign(found, plan.rules)
    if calibration is None:
        require_no_calibration(plan, chosen)
    before = _evaluate(model, text, length, "perplexity before", progress)
    amaxes = _calibrate(model, calibration, length, progress)
    costs: list[Cost] = []
    if plan.bits is not None:
        watch = lambda done, total: progress("sensitivity", done, total)  # noqa: E731
        costs = budget.measure(
            model, budget.groups(found), calibration.ids, length, amaxes, plan.search, plan.four_over_six, watch
        )
        chosen = budget.complete(found, budget.choose(costs, plan.bits))
    size, losses = tensor_bytes(model), []
    for loss in apply(model, found, chosen, amaxes, plan.search, plan.four_over_six):
        losses.append(loss)
        progress("quantize", len(losses), len(found))
    round_matrices(model)
    if plan.kv_cache and amaxes is not None:
        describe_cache(model, amaxes)
    after = _evaluate(model, text, length, "perplexity after", progress)
    with quantized_activations(model) as count:
        served = _evaluate(model, text, length, "perplexity, inputs quantized too", progress) if count else None
    return Report(
        plan, tuple(losses), size, tensor_bytes(model), before, after, served, tuple(costs),
        None if amaxes is None else amaxes.unseen(), 0 if calibration is None else len(calibration.ids),
    )  # fmt: skip


def tensor_bytes(model: nn.Module) -> int:
    """Of a checkpoint of the model: matrices in config.dtype but for quantized ones, all else as it is."""
    total = 0
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.int64 or name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # seeds of rounding, and what is stored as the embeddings
        matrix = (
            tensor.dim() >= 2 and tensor.element_size() > 1 and not name.endswith((".gate.weight", "conv1d.weight"))
        )
        total += tensor.numel() * (model.config.dtype.itemsize if matrix else tensor.element_size())
    return total


@torch.no_grad()
def round_matrices(model: nn.Module) -> None:
    """To config.dtype, but for what is quantized; in place."""
    for module in model.modules():
        if isinstance(module, (Linear, nn.Embedding)):
            module.weight.data = module.weight.to(model.config.dtype)
        elif isinstance(module, Experts):
            module.up_proj.data = module.up_proj.to(model.config.dtype)
            module.down_proj.data = module.down_proj.to(model.config.dtype)


def describe_cache(model: nn.Module, amaxes: Amaxes) -> None:
    """The scales of an FP8 cache, as buffers of the projections that fill it, under their names in a checkpoint."""
    model.kv_cache_algorithm = "FP8"
    for name in filter(lambda name: not name.startswith("mtp."), amaxes.keys_values):
        model.get_submodule(name).register_buffer(f"{name.rpartition('.')[2][0]}_scale", amaxes.cache_scale(name))


def require_high_precision(model: nn.Module) -> None:
    twice = next((name for name, module in model.named_modules() if isinstance(module, QuantizedWeight)), None)
    require(twice is None, "model", f"{twice}, quantized already", "a model in high precision")


def require_no_calibration(plan: Plan, chosen: dict[str, str] | None) -> None:
    require(
        plan.bits is None, "calibrate", "no text for --bits", "a text file to measure costs on (do: --calibrate FILE)"
    )
    needing = [f"{name}={form}" for name, form in chosen.items() if form in NEEDS_INPUT_SCALE]
    require(
        not needing, "calibrate", f"no text, and {needing[0] if needing else ''}",
        "a text file for the input scales of nvfp4 and fp8 (do: --calibrate FILE, or w4a16, which has none)",
    )  # fmt: skip


def _calibrate(model: nn.Module, calibration: Text | None, length: int, progress: Progress) -> Amaxes | None:
    if calibration is None:
        return None
    progress("calibration", 0, 1)
    amaxes = calibrate(model, calibration.ids, length)
    progress("calibration", 1, 1)
    return amaxes


def _evaluate(model: nn.Module, text: Text | None, length: int, what: str, progress: Progress) -> Evaluation | None:
    if text is None:
        return None
    progress(what, 0, 1)
    evaluation = evaluate(model, text, length)
    progress(what, 1, 1)
    return evaluation


def _in_backbone(target: Target) -> bool:
    return target.name.startswith("backbone.layers.")


def _assignment(losses: tuple[Loss, ...]) -> tuple[list[Target], dict[str, str]]:
    return [loss.target for loss in losses], {loss.target.name: loss.format for loss in losses}
