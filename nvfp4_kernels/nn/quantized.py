"""Layers whose weights are kept as a checkpoint stores them: NVFP4 or FP8, decoded as they are read, never trained.

Buffers have the names and shapes of ModelOpt's exports, so that a layer's state_dict is the checkpoint's: weight,
weight_scale, weight_scale_2, input_scale; those of experts are stacked, an expert a row. `input_scale` (amax of the
activations / (6 * 448), for FP8 / 448) is kept for others: here activations stay in their own precision (W4A16, W8A16).
Gradients pass through to the inputs.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvfp4_kernels.autograd.weight_only import weight_only, weight_only_experts
from nvfp4_kernels.formats import e4m3
from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.formats.packed import PackedNVFP4Tensor, unpack
from nvfp4_kernels.formats.tensor import MXFP8Tensor, NVFP4Tensor
from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ops.matmul._packed import packed_parts
from nvfp4_kernels.ops.relu2.op import relu2
from nvfp4_kernels.ops.route.op import Routing


class QuantizedWeight(nn.Module):
    """One matrix [out_features, in_features], or `experts` of them; the subclass says in which format.

    input_scale: whether there is a place for it. bias: fp32 parameter, for a single matrix.
    `.to(dtype)` and its like move the buffers and leave their dtypes: codes and scales are bits, not values.
    """

    BLOCK = 1  # in_features is a multiple of it

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        input_scale: bool = False,
        experts: int | None = None,
        device=None,
    ):
        super().__init__()
        require(in_features % self.BLOCK == 0, "in_features", in_features, f"a multiple of {self.BLOCK}")
        require(experts is None or not bias, "bias", "True for experts", "False: they have none")
        self.in_features, self.out_features, self.experts = in_features, out_features, experts
        lead = () if experts is None else (experts,)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=torch.float32, device=device)) if bias else None
        forms = {name: (dtype, (*lead, *shape)) for name, (dtype, shape) in self._forms().items()}
        for name, (dtype, shape) in forms.items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))
        scale = torch.zeros(lead, dtype=torch.float32, device=device) if input_scale else None
        self.register_buffer("input_scale", scale)

    def forward(self, x: Tensor, groups: Routing | Tensor | None = None) -> Tensor:
        """x [..., in] W^T + b. For experts as autograd.weight_only.weight_only_experts."""
        if self.experts is None:
            return self._product(x)
        return weight_only_experts(x, self.stack(), groups)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W, [out, in] or [experts, out, in]."""
        if self.experts is None:
            return self._decode(None, dtype)
        return torch.stack([self._decode(e, dtype) for e in range(self.experts)])

    def extra_repr(self) -> str:
        lead = "" if self.experts is None else f"experts={self.experts}, "
        return f"{lead}in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn, recurse=True):
        forms = {name: (b.dtype, b.shape) for name, b in self._buffers.items() if b is not None}
        for name in forms:
            self._buffers[name] = self._buffers[name].reshape(-1).view(torch.uint8)
        try:
            return super()._apply(fn, recurse)
        finally:
            for name, (dtype, shape) in forms.items():
                self._buffers[name] = self._buffers[name].view(dtype).view(shape)

    def _set(self, bias: Tensor | None, input_scale: Tensor | None, **buffers: Tensor) -> "QuantizedWeight":
        self.bias = None if bias is None else nn.Parameter(bias.detach())
        for name, value in {**buffers, "input_scale": input_scale}.items():
            setattr(self, name, value)
        return self

    def _part(self, buffer: Tensor, expert: int | None) -> Tensor:
        return buffer if expert is None else buffer[expert]


class NVFP4Weight(QuantizedWeight):
    """weight: uint8 [out, in / 2], weight_scale: E4M3 [out, in / 16], weight_scale_2: fp32 [], the global scale.

    They may be held packed instead, in the layout that the CUDA kernels read (`pack`). Then the buffers packed_codes and
    packed_scales stand in the place of weight and weight_scale, which the state_dict goes on to have, unpacked, and which
    `weight` and `weight_scale` give, unpacked anew each time.
    """

    BLOCK = 16
    FORMS = "weight", "weight_scale"  # what is packed

    @classmethod
    def from_tensors(
        cls, weight: NVFP4Tensor | list[NVFP4Tensor], bias: Tensor | None = None, input_scale: Tensor | None = None
    ) -> "NVFP4Weight":
        """Around one quantized [out, in] weight, which it shares, or around a copy of one for each expert."""
        stacked = isinstance(weight, list)
        first = weight[0] if stacked else weight
        require(first.hadamard is None, "weight", "a rotated form", "a form without Hadamard transform")
        made = cls(first.shape[1], first.shape[0], experts=len(weight) if stacked else None, device="meta")
        names = dict(weight="codes", weight_scale="scales", weight_scale_2="global_scale")
        if stacked:
            parts = {name: torch.stack([getattr(w, part) for w in weight]) for name, part in names.items()}
        else:
            parts = {name: getattr(weight, part) for name, part in names.items()}
        return made._set(bias, input_scale, **parts)

    @property
    def is_packed(self) -> bool:
        return "packed_codes" in self._buffers

    def pack(self, dtype: torch.dtype) -> None:
        """Hold the weight packed, not twice, where the kernels for activations of `dtype` read it so; else nothing happens."""
        if self.is_packed or (parts := packed_parts(self.weight, self.weight_scale, dtype)) is None:
            return
        del self.weight, self.weight_scale
        for name, part in zip(("packed_codes", "packed_scales"), parts, strict=True):
            self.register_buffer(name, part, persistent=False)

    def unpack(self) -> None:
        """Hold the weight as a checkpoint does; the same bytes as before `pack`."""
        if self.is_packed:
            self._buffers = self._with(self._unpacked())
            self._non_persistent_buffers_set -= {"packed_codes", "packed_scales"}

    @contextlib.contextmanager
    def without_values(self) -> Iterator[None]:
        """While it lasts, what is packed is there as a checkpoint has it, but on the meta device, where it takes no memory."""
        held = self._buffers
        if self.is_packed:
            forms, lead = self._forms(), self.packed_codes.shape[:-4]
            parts = [(forms[name][0], (*lead, *forms[name][1])) for name in self.FORMS]
            self._buffers = self._with(torch.empty(shape, dtype=dtype, device="meta") for dtype, shape in parts)
        try:
            yield
        finally:
            self._buffers = held

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        return unpack(self.packed_codes, self.packed_scales, self.in_features)

    def _with(self, parts: Iterable[Tensor]) -> dict[str, Tensor | None]:
        """The buffers with these in the place of the packed ones."""
        rest = {name: part for name, part in self._buffers.items() if not name.startswith("packed_")}
        return dict(zip(self.FORMS, parts, strict=True)) | rest

    def tensor(self, expert: int | None = None) -> NVFP4Tensor | PackedNVFP4Tensor:
        """The weight as nk.matmul takes it."""
        kind = PackedNVFP4Tensor if self.is_packed else NVFP4Tensor
        parts = (self._part(part, expert) for part in self.stack()[:3])
        return kind(*parts, torch.Size((self.out_features, self.in_features)))

    def stack(self) -> Stack:
        """All experts' weights as nk.grouped_matmul takes them."""
        held = self._buffers  # not by attributes, whose search a decoded token pays six times
        names = ("packed_codes", "packed_scales") if self.is_packed else self.FORMS
        return Stack(*(held[name] for name in names), held["weight_scale_2"])

    def __getattr__(self, name: str):
        if name in self.FORMS and "packed_codes" in self.__dict__.get("_buffers", {}):
            return self._unpacked()[self.FORMS.index(name)]
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        held = self._buffers
        self._buffers = self._with(self._unpacked()) if self.is_packed else held
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        finally:
            self._buffers = held

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        self.unpack()
        name, errors = prefix + "weight_scale", rest[-1]
        scales = state_dict.get(name)
        if scales is not None and not scales.is_meta and e4m3.has_negative(scales):
            errors.append(f"{name}: got a negative block scale; allowed: 0 to 448, or NaN")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _apply(self, fn, recurse=True):
        made = super()._apply(fn, recurse)
        if self.is_packed and self.packed_codes.is_cpu:  # where no kernel reads it so
            self.unpack()
        return made

    def _forms(self):
        rows, cols = self.out_features, self.in_features
        return {
            "weight": (torch.uint8, (rows, cols // 2)),
            "weight_scale": (torch.float8_e4m3fn, (rows, cols // 16)),
            "weight_scale_2": (torch.float32, ()),
        }

    def _product(self, x: Tensor) -> Tensor:
        return weight_only(x, self.tensor(), self.bias)

    def _decode(self, expert: int | None, dtype: torch.dtype) -> Tensor:
        return self.tensor(expert).dequantize(dtype)


class FP8Weight(QuantizedWeight):
    """weight: E4M3 [out, in], weight_scale: fp32 []; W = weight * weight_scale."""

    @classmethod
    def from_tensors(
        cls, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, input_scale: Tensor | None = None
    ) -> "FP8Weight":
        """Around E4M3 codes [out, in] and their fp32 scale [], or [experts, out, in] and [experts]; all are shared."""
        made = cls(
            weight.shape[-1], weight.shape[-2], experts=len(weight) if weight.dim() == 3 else None, device="meta"
        )
        return made._set(bias, input_scale, weight=weight, weight_scale=weight_scale)

    def _forms(self):
        return {
            "weight": (torch.float8_e4m3fn, (self.out_features, self.in_features)),
            "weight_scale": (torch.float32, ()),
        }

    def stack(self) -> Stack:
        """All experts' weights as nk.grouped_matmul takes them."""
        return Stack(self.weight, None, self.weight_scale)

    def _product(self, x: Tensor) -> Tensor:
        codes, padding = self.weight, -self.in_features % 32
        if padding:
            x, codes = F.pad(x, (0, padding)), F.pad(codes.view(torch.uint8), (0, padding)).view(codes.dtype)
        ones = torch.full((), 127, dtype=torch.uint8, device=codes.device)  # E4M3 is MXFP8 with block scales of 2^0
        scales = ones.expand(self.out_features, codes.shape[1] // 32)
        return weight_only(x, MXFP8Tensor(codes, scales, codes.shape), self.bias, self.weight_scale)

    def _decode(self, expert: int | None, dtype: torch.dtype) -> Tensor:
        return (self._part(self.weight, expert).float() * self._part(self.weight_scale, expert)).to(dtype)


class QuantizedExperts(nn.Module):
    """In the place of nn.moe.Experts: up_proj and down_proj, each the matrices of all experts in a format of its own."""

    def __init__(self, up_proj: QuantizedWeight, down_proj: QuantizedWeight):
        super().__init__()
        self.up_proj, self.down_proj = up_proj, down_proj

    def forward(self, x: Tensor, groups: Routing | Tensor, weights: Tensor | None = None) -> Tensor:
        """As nn.moe.Experts."""
        offsets = groups.offsets if isinstance(groups, Routing) else groups
        return self.down_proj(relu2(self.up_proj(x, groups), weights), offsets)

    def pack(self, dtype: torch.dtype) -> None:
        """As NVFP4Weight.pack, of both or neither: nk.expert_mlp reads them alike."""
        parts = [part for part in (self.up_proj, self.down_proj) if isinstance(part, NVFP4Weight)]
        for part in parts:
            part.pack(dtype)
        if not all(part.is_packed for part in parts):
            for part in parts:
                part.unpack()

    def stacks(self) -> tuple[Stack, Stack]:
        """Both as nk.expert_mlp takes them."""
        return self.up_proj.stack(), self.down_proj.stack()
