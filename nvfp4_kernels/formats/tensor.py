"""NVFP4Tensor: the quantized operand. A plain container, deliberately no Tensor subclass: torch ops on it fail loudly."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from nvfp4_kernels.formats import e4m3


class QuantizedTensor:
    """What the containers share: moving, copying, cutting and naming their tensors as one.

    UNITS: how many columns of a matrix an element of the second axis of a part stands for, by the part's name.
    """

    UNITS: dict[str, int]

    def _map(self, change):
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(part) for name, part in parts.items() if isinstance(part, Tensor)})

    def to(self, *args, **kwargs):
        """Move every part to another device (arguments of torch.Tensor.to). Raises TypeError on a change of dtype."""
        if torch.empty((), dtype=torch.uint8).to(*args, **kwargs).dtype != torch.uint8:
            raise TypeError(f"to: got a dtype in {args or kwargs}; allowed: devices. Use dequantize(dtype) for values")
        device = torch.empty((), dtype=torch.uint8, device=self.device).to(*args, **kwargs).device
        return self._map(lambda part: part.to(device))

    def clone(self):
        return self._map(Tensor.clone)

    def detach(self):
        return self._map(Tensor.detach)

    def __reduce__(self):
        # plain pickle knows no fp8 storage: those parts travel as bytes
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        fp8 = [name for name, part in parts.items() if isinstance(part, Tensor) and part.dtype == torch.float8_e4m3fn]
        return _rebuild, (type(self), parts | {name: parts[name].view(torch.uint8) for name in fp8}, fp8)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def is_cpu(self) -> bool:
        return self.codes.is_cpu

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(getattr(self, f.name).nbytes for f in fields(self) if isinstance(getattr(self, f.name), Tensor))

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The parts by name, ready for safetensors; rebuild with the class and the logical shape."""
        return {
            prefix + f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }

    def columns(self, first: int, last: int):
        """Columns first to last of a matrix, as views: multiples of 128, but for the end of the matrix."""
        end = None if last == self.shape[1] else last
        parts = {name: getattr(self, name)[:, first // n : end and end // n] for name, n in self.UNITS.items()}
        return replace(self, **parts, shape=torch.Size((self.shape[0], last - first)))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, [*shape] in `dtype` (bf16, fp16 or fp32): exact in fp32, one rounding otherwise.

        Rotated forms stay rotated. Raises TypeError for another dtype.
        """
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise TypeError(f"dtype: got {dtype}; allowed: bfloat16, float16, float32")
        parts = (part.view(torch.uint8) for part in (self.codes, self.scales))
        codes, scales = (part.flatten(0, -2) if part.dim() > 1 else part[None] for part in parts)  # [None]: of a vector
        global_scale = getattr(self, "global_scale", None)
        return torch.ops.nvfp4.dequantize(codes, scales, global_scale, self.shape[-1], str(dtype)[6:]).view(self.shape)

    def __repr__(self) -> str:
        words = [f"shape={list(self.shape)}"]
        if (scale := getattr(self, "global_scale", None)) is not None and not scale.is_meta:
            words.append(f"global_scale={scale.item():.6g}")
        if (hadamard := getattr(self, "hadamard", None)) is not None:
            words.append(f"hadamard=0x{hadamard:04x}")
        return f"{type(self).__name__}({', '.join(words)}, device={str(self.device)!r}, bytes={self.nbytes:,})"


@dataclass(frozen=True, eq=False, repr=False)
class NVFP4Tensor(QuantizedTensor):
    """value[..., j] = e2m1(code[..., j]) * scales[..., j // 16] * global_scale

    codes: uint8 [..., ceil16(cols) / 2], two E2M1 codes a byte, element 2j in the low nibble.
    scales: float8_e4m3fn [..., ceil16(cols) / 16], row-major, 0 to 448, or NaN, which makes its block NaN. Negative ones, -0
        among them, are not NVFP4, whose scales have no sign: a product may read them as any number or as NaN. They are not
        looked for here, for a product of one row takes as long as reading them all; parts from elsewhere pass `checked`.
    global_scale: fp32, scalar; NaN when the source held a NaN or an infinity, so that no decoded value is finite.
    shape: the logical shape [..., cols], without padding.
    hadamard: None, or the sign mask of the transform the values went through; a GEMM wants both operands alike.

    Raises ValueError when the parts do not fit together. Layout: numerics of "Pretraining LLMs with NVFP4", appendix B.
    """

    UNITS = {"codes": 2, "scales": 16}

    codes: Tensor
    scales: Tensor
    global_scale: Tensor
    shape: torch.Size
    hadamard: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "shape", torch.Size(self.shape))
        lead, blocks = self.shape[:-1], (self.shape[-1] + 15) // 16
        wanted = {
            "codes": (torch.uint8, (*lead, blocks * 8)),
            "scales": (torch.float8_e4m3fn, (*lead, blocks)),
            "global_scale": (torch.float32, ()),
        }
        _check_parts(self, wanted)

    def checked(self) -> "NVFP4Tensor":
        """This tensor once its scales have been read, with 0 for those of -0. Raises ValueError where one is negative."""
        scales = e4m3.with_unsigned_zeros(self.scales)
        if e4m3.has_negative(scales):
            raise ValueError("scales: got a negative block scale; allowed: 0 to 448, or NaN")
        return replace(self, scales=scales)

    @property
    def float4(self) -> Tensor:
        """The codes as torch.float4_e2m1fn_x2, the same bytes (what torch's scaled_mm takes)."""
        return self.codes.view(torch.float4_e2m1fn_x2)


@dataclass(frozen=True, eq=False, repr=False)
class MXFP8Tensor(QuantizedTensor):
    """value[..., j] = codes[..., j] * 2 ** (scales[..., j // 32] - 127)

    codes: float8_e4m3fn [..., ceil32(cols)].
    scales: uint8 [..., ceil32(cols) / 32], E8M0 (the bytes of torch.float8_e8m0fnu); 255 is NaN.
    shape: the logical shape [..., cols].

    Raises ValueError when the parts do not fit together. Source: OCP Microscaling Formats (MX) v1.0; the scale is
    rounded up so that nothing saturates ("Recipes for Pre-training LLMs with MXFP8").
    """

    UNITS = {"codes": 1, "scales": 32}

    codes: Tensor
    scales: Tensor
    shape: torch.Size

    def __post_init__(self):
        object.__setattr__(self, "shape", torch.Size(self.shape))
        lead, blocks = self.shape[:-1], (self.shape[-1] + 31) // 32
        wanted = {
            "codes": (torch.float8_e4m3fn, (*lead, blocks * 32)),
            "scales": (torch.uint8, (*lead, blocks)),
        }
        _check_parts(self, wanted)


def _rebuild(kind: type, parts: dict, fp8: list[str]) -> QuantizedTensor:
    return kind(**parts | {name: parts[name].view(torch.float8_e4m3fn) for name in fp8})


torch.serialization.add_safe_globals([_rebuild, NVFP4Tensor, MXFP8Tensor])  # for torch.load's weights_only


def _check_parts(tensor: QuantizedTensor, wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    for name, (dtype, shape) in wanted.items():
        part = getattr(tensor, name)
        if part.dtype != dtype or tuple(part.shape) != shape:
            raise ValueError(
                f"{name}: got {part.dtype} {list(part.shape)}; allowed: {dtype} {list(shape)} for shape {list(tensor.shape)}"
            )
        if part.device != tensor.codes.device:
            raise ValueError(f"{name}: got device {part.device}; allowed: {tensor.codes.device}, where the codes are")
