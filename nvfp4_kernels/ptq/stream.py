"""A checkpoint quantized layer by layer, from its files to new ones: for plans without a budget of bits.

The model stays on the meta device, its layers quantized there in name alone. When the writer asks for a value, the layer that
it belongs to is read, quantized and kept until the next one is asked for. Texts have been run through it before, layer by
layer too. The files are those that quantize_model and save_pretrained would write.
"""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from nvfp4_kernels.checkpoint import names
from nvfp4_kernels.checkpoint.huggingface import open_model
from nvfp4_kernels.checkpoint.load import Reader
from nvfp4_kernels.checkpoint.source import Source
from nvfp4_kernels.nn.quantized import FP8Weight, NVFP4Weight, QuantizedExperts, QuantizedWeight
from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ptq import formats
from nvfp4_kernels.ptq.activations import quantized_activations
from nvfp4_kernels.ptq.apply import Loss, quantize_matrices, swap
from nvfp4_kernels.ptq.evaluate import Evaluation, Text
from nvfp4_kernels.ptq.formats import NEEDS_INPUT_SCALE, Target
from nvfp4_kernels.ptq.layers import Layers
from nvfp4_kernels.ptq.quantize import (
    Plan,
    Progress,
    Report,
    describe_cache,
    require_high_precision,
    require_no_calibration,
    round_matrices,
    tensor_bytes,
)


class Stream:
    """model: quantized by `plan`, on the meta device; `read` gives its values, as save_pretrained's writer takes it.

    calibration, text, length: as of quantize_model; a plan with a budget of bits is not for layers one by one.
    Raises ValueError as quantize_model and from_pretrained do.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        device: torch.device,
        calibration: Text | None = None,
        text: Text | None = None,
        length: int = 2048,
        progress: Progress = lambda *done: None,
    ):
        layers = Layers(source, device)
        self.model, fitted = layers.model, layers.fit
        require_high_precision(self.model)
        self.model.kv_cache_algorithm = (source.quantization or {}).get("kv_cache")
        self.model.source = source.companions
        for module, part in fitted.wants:
            if part in ("k_scale", "v_scale"):
                self.model.get_submodule(module).register_buffer(part, torch.empty((), device="meta"))
        self.plan, self._device, self._progress = plan, device, progress
        self._text, self._length = text, length
        self._targets = formats.targets(self.model)
        require(plan.bits is None, "plan", "a budget of bits", "rules: costs are measured in the whole model")
        self._chosen = formats.assign(self._targets, plan.rules)
        if calibration is None:
            require_no_calibration(plan, self._chosen)
        self._perplexity = self._evaluate(layers, "perplexity before")
        self._tokens, self._amaxes = 0, None
        if calibration is not None:
            watch = lambda done, total: progress("calibration", done, total)  # noqa: E731
            self._tokens, self._amaxes = len(calibration.ids), layers.calibrate(calibration.ids, length, watch)
        self._by_name = {target.name: target for target in self._targets}
        self._reader = Reader(fitted, device)
        self._before = tensor_bytes(self.model)
        self._losses: dict[str, Loss] = {}
        self._held: tuple[str, Tensor | QuantizedWeight] | None = None
        self._quantize_names()
        round_matrices(self.model)
        if plan.kv_cache and self._amaxes is not None:
            describe_cache(self.model, self._amaxes)
        self._tensors = self.model.state_dict()

    def _quantize_names(self) -> None:
        waiting = {}
        for target in self._targets:
            if (form := self._chosen[target.name]) == "bf16":
                continue
            kind, (rows, cols) = FP8Weight if form == "fp8" else NVFP4Weight, target.shape
            biased = not target.experts and self.model.get_submodule(target.name).bias is not None
            scaled = self._amaxes is not None and form in NEEDS_INPUT_SCALE
            layer = kind(cols, rows, biased, scaled, target.experts, "meta")
            if target.experts is None:
                swap(self.model, target.name, layer)
                continue
            stack, _, part = target.name.rpartition(".")
            waiting[part] = layer
            if len(waiting) == 2:
                swap(self.model, stack, QuantizedExperts(waiting["up_proj"], waiting["down_proj"]))
                waiting = {}

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """A tensor of the model's state_dict."""
        if not (tensor := self._tensors[name]).is_meta:  # the scale of a cache
            return tensor
        where, _ = names.place(name)
        target = self._by_name.get(where.module)
        if target is None or where.part == "bias" or self._chosen[target.name] == "bf16":
            return self._hold(name, lambda: self._plain(*where[:2]).to(tensor.dtype))
        return getattr(self._hold(target.name, lambda: self._quantized(target)), where.part)

    def _hold(self, name: str, make):
        """What was made last is kept: the experts of a stack are asked for one by one, the parts of a layer too."""
        if self._held is None or self._held[0] != name:
            self._held = None  # freed before the next is made
            self._held = name, make()
        return self._held[1]

    def _plain(self, module: str, part: str) -> Tensor:
        matrices = list(self._reader.matrices(module, part))
        return torch.stack(matrices) if names.is_stack(module) else matrices[0]

    def _quantized(self, target: Target) -> QuantizedWeight:
        matrices = self._reader.matrices(target.name, "weight")
        form, plan = self._chosen[target.name], self.plan
        scale = None if self._amaxes is None else self._amaxes.input_scale(target.name, form)
        layer, loss = quantize_matrices(target, matrices, form, plan.search, plan.four_over_six, input_scale=scale)
        self._losses[target.name] = loss
        self._progress("quantize", len(self._losses), sum(form != "bf16" for form in self._chosen.values()))
        return layer

    def _evaluate(self, layers: Layers, what: str) -> Evaluation | None:
        if self._text is None:
            return None
        return layers.evaluate(self._text, self._length, lambda done, total: self._progress(what, done, total))

    def report(self, written: Path) -> Report:
        """When all has been read and lies in the folder `written`, which is evaluated on the text.

        What is not quantized has lost nothing, and was not looked at.
        """
        losses = (self._losses.get(t.name, Loss(t, "bf16", 0.0, 0.0)) for t in self._targets)
        unseen = None if self._amaxes is None else self._amaxes.unseen()
        report = Report(
            self.plan, tuple(losses), self._before, tensor_bytes(self.model), self._perplexity, unseen=unseen,
            calibration_tokens=self._tokens,
        )  # fmt: skip
        if self._text is None:
            return report
        layers = Layers(open_model(written), self._device)
        after = self._evaluate(layers, "perplexity after")
        with quantized_activations(layers.model) as count:
            served = self._evaluate(layers, "perplexity, inputs quantized too") if count else None
        return dataclasses.replace(report, after=after, served=served)
