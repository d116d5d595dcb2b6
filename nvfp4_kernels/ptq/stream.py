"""A checkpoint quantized layer by layer, from its files to new ones: for plans that need no more than the weights.

The model stays on the meta device, its layers quantized there in name alone. When the writer asks for a value, the layer that
it belongs to is read, quantized and kept until the next one is asked for. The files are those that quantize_model and
save_pretrained would write.
"""

import torch
from torch import Tensor

from nvfp4_kernels.checkpoint import names
from nvfp4_kernels.checkpoint.fit import fit
from nvfp4_kernels.checkpoint.load import Reader, insert_layers
from nvfp4_kernels.checkpoint.source import Source
from nvfp4_kernels.model.hybrid import HybridModel
from nvfp4_kernels.nn.quantized import FP8Weight, NVFP4Weight, QuantizedExperts, QuantizedWeight
from nvfp4_kernels.ptq import formats
from nvfp4_kernels.ptq.apply import Loss, quantize_matrices, swap
from nvfp4_kernels.ptq.formats import Target
from nvfp4_kernels.ptq.quantize import (
    Plan,
    Progress,
    Report,
    require_high_precision,
    require_no_calibration,
    round_matrices,
    tensor_bytes,
)


class Stream:
    """model: quantized by `plan`, on the meta device; `read` gives its values, as save_pretrained's writer takes it.

    Raises ValueError for a plan that needs calibration, and as quantize_model and from_pretrained do.
    """

    def __init__(self, source: Source, plan: Plan, device: torch.device, progress: Progress = lambda *done: None):
        with torch.device("meta"):
            self.model = HybridModel(source.config)
        fitted = fit(self.model, source.entries, source.folder)
        insert_layers(self.model, fitted.layers, fitted.problems)
        require_high_precision(self.model)
        self.model.kv_cache_algorithm = (source.quantization or {}).get("kv_cache")
        self.model.source = source.companions
        for module, part in fitted.wants:
            if part in ("k_scale", "v_scale"):
                self.model.get_submodule(module).register_buffer(part, torch.empty((), device="meta"))
        self.plan, self._progress = plan, progress
        self._targets = formats.targets(self.model)
        require_no_calibration(plan, None if plan.rules is None else formats.assign(self._targets, plan.rules))
        self._chosen = formats.assign(self._targets, plan.rules)
        self._by_name = {target.name: target for target in self._targets}
        self._reader = Reader(fitted, device)
        self._before = tensor_bytes(self.model)
        self._losses: dict[str, Loss] = {}
        self._held: tuple[str, Tensor | QuantizedWeight] | None = None
        self._quantize_names()
        round_matrices(self.model)
        self._dtypes = {name: tensor.dtype for name, tensor in self.model.state_dict().items()}

    def _quantize_names(self) -> None:
        waiting = {}
        for target in self._targets:
            if (form := self._chosen[target.name]) == "bf16":
                continue
            kind, (rows, cols) = FP8Weight if form == "fp8" else NVFP4Weight, target.shape
            biased = not target.experts and self.model.get_submodule(target.name).bias is not None
            layer = kind(cols, rows, biased, experts=target.experts, device="meta")
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
        where, _ = names.place(name)
        target = self._by_name.get(where.module)
        if target is None or where.part == "bias" or self._chosen[target.name] == "bf16":
            return self._hold(name, lambda: self._plain(*where[:2]).to(self._dtypes[name]))
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
        layer, loss = quantize_matrices(target, matrices, form, plan.search, plan.four_over_six)
        self._losses[target.name] = loss
        self._progress("quantize", len(self._losses), sum(form != "bf16" for form in self._chosen.values()))
        return layer

    def report(self) -> Report:
        """When all has been read. What is not quantized has lost nothing, and was not looked at."""
        losses = (self._losses.get(t.name, Loss(t, "bf16", 0.0, 0.0)) for t in self._targets)
        return Report(self.plan, tuple(losses), self._before, tensor_bytes(self.model))
