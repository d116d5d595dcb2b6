"""The tensors of a checkpoint into a model on the meta device, one after the other, shard after shard.

Each tensor of the model is allocated once, where and as it is to stay, when the first of its pieces arrives; of the
files no more is held than the shard that is being read. So the peak is the model and one shard.
"""

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nvfp4_kernels.checkpoint import names
from nvfp4_kernels.checkpoint.fit import EMBEDDINGS, NOISE, Fit, Problems, Want
from nvfp4_kernels.checkpoint.source import CheckpointError, Entry
from nvfp4_kernels.formats import e4m3
from nvfp4_kernels.nn.linear import new_noise
from nvfp4_kernels.nn.quantized import QuantizedExperts, QuantizedWeight

ALWAYS_FP32 = ("e_score_correction_bias", "A_log", "D", "dt_bias")
_BITS = (torch.uint8, torch.float8_e4m3fn, torch.int64)
_READ = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64,
    "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


class Piece(NamedTuple):
    """What one step reads: a tensor or an expert's share of it; of a matrix to be dequantized all of its parts."""

    module: str
    part: str
    expert: int | None
    parts: dict[str, tuple[Entry, bool]]


class Files:
    """Reads tensors; holds open no shard but those that the last piece came from, mostly one."""

    def __init__(self):
        self._open: dict[str, object] = {}

    def read(self, piece: Piece) -> dict[str, Tensor]:
        """The parts, as views of the file where the checkpoint does not hold the reciprocal. Block scales of -0 are 0."""
        from safetensors import SafetensorError, safe_open

        needed = {entry.shard for entry, _ in piece.parts.values()}
        self._open = {shard: handle for shard, handle in self._open.items() if shard in needed}
        values = {}
        for part, (entry, reciprocal) in piece.parts.items():
            if entry.shard not in self._open:
                try:
                    self._open[entry.shard] = safe_open(entry.shard, "pt", device="cpu")
                except SafetensorError as error:  # of shapes, say, that do not fit the places of their bytes
                    raise CheckpointError(
                        f"checkpoint: {entry.shard} is no safetensors file ({error}); do: copy it anew"
                    ) from error
            value = self._open[entry.shard].get_tensor(entry.name)
            if part.endswith("_scale") and value.dtype == torch.float8_e4m3fn:
                value = e4m3.with_unsigned_zeros(value)
            values[part] = value.reciprocal() if reciprocal else value
        return values


def insert_layers(model: nn.Module, layers: dict[str, QuantizedWeight], problems: Problems) -> None:
    """Puts the quantized layers in the place of those that they stand for."""
    for module, layer in layers.items():
        parent, _, leaf = module.rpartition(".")
        if not names.is_stack(module):
            setattr(model.get_submodule(parent), leaf, layer)
        elif leaf == "up_proj":
            other = layers.get(f"{parent}.down_proj")
            if other is None:
                problems.add("half quantized", f"{parent}.down_proj; do: quantized='dequantize'")
                continue
            above, _, name = parent.rpartition(".")
            setattr(model.get_submodule(above), name, QuantizedExperts(layer, other))
        elif f"{parent}.up_proj" not in layers:
            problems.add("half quantized", f"{parent}.up_proj; do: quantized='dequantize'")
    problems.check()


class Filling:
    """Tensors of a model as their pieces are read. filled: by module and part, allocated with the first piece of each."""

    def __init__(self, fit: Fit, dtype: torch.dtype | None, device: torch.device, dequantize: bool):
        self.fit, self.dtype, self.device, self.dequantize = fit, dtype, device, dequantize
        self.files, self.filled = Files(), {}

    def take(self, piece: Piece) -> None:
        """Reads a piece into its place. Scales that are NaN, infinite or negative are added to the problems; those of experts'
        inputs are not (`lend_input_scales`)."""
        layer = self.fit.layers.get(piece.module) if len(piece.parts) > 1 else None
        values = self.files.read(piece)
        for part, value in values.items():
            if part.endswith(("_scale", "_scale_2")) and not _lent(piece.module, part) and not _sound(value):
                self.fit.problems.add("with NaN, infinite or negative scales", piece.parts[part][0].name)
        value = values[piece.part] if layer is None else _dequantize(layer, values, self.device)
        where = piece.module, piece.part
        if where not in self.filled:
            want = self.fit.wants[where]
            kept = self.dtype or (torch.float32 if layer is not None else _stored(piece, self.fit.double))
            shape = want.shape if layer is None else (layer.out_features, layer.in_features)
            shape = shape if want.experts is None else (want.experts, *shape)
            dtype = _held(*where, shape, kept, value.dtype)
            self.filled[where] = torch.empty(shape, dtype=dtype, device=self.device)
            if _lent(*where):
                self.filled[where].fill_(math.nan)
        target = self.filled[where] if piece.expert is None else self.filled[where][piece.expert]
        target.copy_(value.reshape(target.shape))

    def lend_input_scales(self) -> None:
        """Calibration that gave an expert no token leaves its input_scale out, or NaN: the largest of its stack stands in. No
        product here reads it."""
        lent = 0
        for (module, part), scales in self.filled.items():
            if _lent(module, part):
                known = scales.isfinite() & (scales >= 0)
                if not known.any():
                    self.fit.problems.add("with NaN, infinite or negative scales", f"{module}.{part}")
                    continue
                lent += int((~known).sum())
                scales.copy_(torch.where(known, scales, scales[known].max()))
        if lent:
            warnings.warn(
                f"checkpoint: {self.fit.problems.folder} has no input_scale for {lent} matrices of experts, which its "
                "calibration did not reach: the largest of their stack stands in",
                stacklevel=4,
            )


def fill(
    model: nn.Module,
    fit: Fit,
    dtype: torch.dtype | None,
    device: torch.device,
    dequantize: bool,
    within: tuple[str, ...] = ("",),
) -> None:
    """Every tensor of `model`, from the checkpoint or, where that has none, as it is at a model's start.

    within: names of the modules to fill; others stay as they are.
    Raises CheckpointError for scales that are NaN, infinite or negative, all of them named.
    """
    filling = Filling(fit, dtype, device, dequantize)
    for piece in sorted(_pieces(fit, dequantize, within), key=_position):
        filling.take(piece)
    filling.lend_input_scales()
    fit.problems.check()
    for (module, part), tensor in filling.filled.items():
        quantized = module in fit.layers and not dequantize
        _put(model, names.parameter_name(module, part, quantized), tensor)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.backbone.embeddings.weight
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta and _inside(name, within):
            drawn = name.rpartition(".")[2] in NOISE
            _put(model, name, new_noise(device) if drawn else torch.zeros_like(buffer, device=device))


class Reader:
    """The tensors of a model of which no layer is quantized, each as `fill` would have it when it is asked for."""

    def __init__(self, fit: Fit, device: torch.device):
        self._fit, self._device, self._files = fit, device, Files()

    def matrices(self, module: str, part: str) -> Iterator[Tensor]:
        """A tensor, or those of the experts of a stack, one after the other."""
        if module in self._fit.layers:  # embeddings
            yield _dequantize(self._fit.layers[module], self._files.read(_whole(self._fit, module, None)), self._device)
            return
        want = self._fit.wants[module, part]
        pieces = [Piece(module, part, expert, {part: found}) for expert, found in _by_expert(want)]
        kept = _stored(min(pieces, key=_position), self._fit.double)
        for piece in pieces:
            value = self._files.read(piece)[part]
            shape = want.shape if want.experts is None else (want.experts, *want.shape)
            made = value.to(self._device, _held(module, part, shape, kept, value.dtype))
            if want.experts is None:
                yield made.reshape(want.shape)
            else:
                yield from made.reshape(-1, *want.shape)


def _by_expert(want: Want) -> list[tuple[int | None, tuple[Entry, bool]]]:
    return sorted(want.found.items(), key=lambda item: -1 if item[0] is None else item[0])


def _inside(name: str, within: tuple[str, ...]) -> bool:
    return any(not module or f"{name}.".startswith(f"{module}.") for module in within)


def _pieces(fit: Fit, dequantize: bool, within: tuple[str, ...]) -> Iterator[Piece]:
    for (module, part), want in fit.wants.items():
        if not _inside(module, within):
            continue
        decoded = (dequantize or module == EMBEDDINGS) and module in fit.layers and part != "bias"
        if decoded and part != "weight" or dequantize and part in ("k_scale", "v_scale"):
            continue
        for expert, found in want.found.items():
            yield _whole(fit, module, expert) if decoded else Piece(module, part, expert, {part: found})


def _whole(fit: Fit, module: str, expert: int | None) -> Piece:
    """All that a quantized matrix is decoded from."""
    needed = (name for name, _ in fit.layers[module].named_buffers() if name != "input_scale")
    return Piece(module, "weight", expert, {name: fit.wants[module, name].found[expert] for name in needed})


def _position(piece: Piece) -> tuple[str, int]:
    entry = piece.parts[piece.part][0]
    return entry.shard, entry.start


def _stored(piece: Piece, double: bool) -> torch.dtype:
    dtype = _READ[piece.parts[piece.part][0].dtype]
    return torch.float32 if dtype == torch.float64 and not double else dtype


def _held(module: str, part: str, shape: tuple[int, ...], dtype: torch.dtype, read: torch.dtype) -> torch.dtype:
    """Matrices have the dtype that is asked for. fp32: what is small, and what rounding would harm, the router above all."""
    if read in _BITS:
        return read
    small = len(shape) < 2 or module.endswith((".conv1d", ".gate")) or part.endswith(("_scale", "_scale_2"))
    return torch.float32 if small or part in ALWAYS_FP32 else dtype


def _sound(scale: Tensor) -> bool:
    """Finite, and not negative; zero is that of a matrix of zeros."""
    if scale.dtype == torch.float8_e4m3fn:
        return bool((scale.view(torch.uint8) < 0x7F).all())  # 0x7F is NaN
    return all(0 <= value < math.inf for value in scale.flatten().tolist())


def _lent(module: str, part: str) -> bool:
    return part == "input_scale" and names.is_stack(module)


def _dequantize(layer: QuantizedWeight, values: dict[str, Tensor], device: torch.device) -> Tensor:
    """The matrix, or those of all experts, in fp32."""
    experts = len(values["weight"]) if values["weight"].dim() == 3 else None
    made = type(layer)(layer.in_features, layer.out_features, experts=experts, device="meta")
    for part, buffer in list(made.named_buffers()):
        setattr(made, part, values[part].to(device).reshape(buffer.shape))
    return made.dequantize()


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor)
    elif leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:  # the scale of a KV cache, for which a linear layer has no place of its own
        module.register_buffer(leaf, tensor)
