"""What each chip is and can do, as data: the only place that asks a device for its capabilities."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Compute capability -> (FP4 tensor cores by instruction, stochastic-rounding conversion). Sources: PTX ISA 9, sections
# tcgen05.mma, mma.sync and cvt: cvt.rs exists on sm_100a and sm_103a alone, so that every other chip rounds in software.
FP4_TENSOR_CORES = {
    (10, 0): "tcgen05",
    (10, 3): "tcgen05",
    (11, 0): "tcgen05",
    (12, 0): "mma.sync",
    (12, 1): "mma.sync",
}
HARDWARE_STOCHASTIC = {(10, 0), (10, 3)}

# The capability that tensors of the meta device are taken to have, while kernels are compiled without a device.
_assumed: tuple[int, int] | None = None


@dataclass(frozen=True)
class Chip:
    """One device of this machine. arch: "cpu" or "sm_90"; notes: what matters to NVFP4 on it."""

    device: str
    name: str
    arch: str
    notes: str

    @property
    def slug(self) -> str:
        """The name as a part of a file's."""
        return self.name.lower().replace(" ", "-").replace("/", "-")


def chips() -> list[Chip]:
    """The CPU, then every CUDA device."""
    found = [Chip("cpu", _cpu_name(), "cpu", "exact decoding to bf16 or fp32, stochastic rounding in software")]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        capability = torch.cuda.get_device_capability(index)
        cores = FP4_TENSOR_CORES.get(capability)
        notes = f"FP4 tensor cores by {cores}" if cores else "no FP4 tensor cores: exact decoding to bf16"
        rounding = "hardware" if capability in HARDWARE_STOCHASTIC else "software"
        arch = f"sm_{capability[0]}{capability[1]}"
        name = torch.cuda.get_device_name(index)
        found.append(Chip(f"cuda:{index}", name, arch, f"{notes}, stochastic rounding in {rounding}"))
    return found


def too_old_for_triton(device: torch.device) -> str | None:
    """Why the Triton kernels do not run on a CUDA device; None where they do."""
    capability = torch.cuda.get_device_capability(device)
    return (
        None
        if capability >= (8, 0)
        else f"the Triton kernels need sm_80 or newer, this is sm_{capability[0]}{capability[1]}"
    )


@contextlib.contextmanager
def assumed(capability: tuple[int, int] | None) -> Iterator[None]:
    """Within it, tensors of the meta device stand for tensors on a device of this capability."""
    global _assumed
    before, _assumed = _assumed, capability
    try:
        yield
    finally:
        _assumed = before


def fp4_tensor_cores(device: torch.device) -> str | None:
    """The instruction by which a device multiplies E2M1 with block scales: "tcgen05", "mma.sync", or None."""
    return FP4_TENSOR_CORES.get(_capability(device))


def matrix_instruction(device: torch.device) -> str:
    """By which instruction a device multiplies 16-bit tiles: "tcgen05", "wgmma" or "mma.sync"; the CPU counts as the last."""
    major = (_capability(device) or (0, 0))[0]
    return {9: "wgmma", 10: "tcgen05", 11: "tcgen05"}.get(major, "mma.sync")


def converts_to_fp4(device: torch.device) -> bool:
    """Whether a device rounds fp32 to E2M1 by an instruction: those with FP4 tensor cores do (PTX ISA 9, cvt)."""
    return fp4_tensor_cores(device) is not None


def rounds_stochastically(device: torch.device) -> bool:
    """Whether a device rounds fp32 to E2M1 by random bits in one instruction."""
    return _capability(device) in HARDWARE_STOCHASTIC


def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type == "meta":
        return _assumed
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def cuda_target(device: torch.device) -> str | None:
    """Which of the architectures that csrc is compiled for runs on a CUDA device: "80", "90a", ..., or None. Code for sm_80
    runs on all of its generation, that for the family 120f on sm_121 too; the suffix "a" binds to one chip.
    """
    major, minor = _capability(device) or (0, 0)
    exact = {(9, 0): "90a", (10, 0): "100a", (10, 3): "103a"}
    return exact.get((major, minor)) or {8: "80", 12: "120f"}.get(major)


def multiprocessors(device: torch.device) -> int:
    """How many blocks a persistent kernel should launch: the SMs of a CUDA device; a few on the CPU, for tests."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 4


def multiplies_by_mkl() -> bool:
    """Whether torch's products in fp32 on the CPU are MKL's."""
    return torch.backends.mkl.is_available()


@functools.cache
def slow_in_16_bits() -> bool:
    """Whether torch's products in bf16 and fp16 on the CPU are loops of its own, without instructions for them: an x86 with
    AVX2 alone, for which oneDNN has no kernels (those for AVX2 take AVX-NE-CONVERT)."""
    by_onednn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.backends.cpu.get_cpu_capability() == "AVX2" and not by_onednn


def most_shared(device: torch.device) -> int:
    """Bytes of shared memory that a block may have: of Hopper and Blackwell's data-center chips, or of sm_120 (CUDA C++
    Programming Guide, table of technical specifications)."""
    return (99 if (_capability(device) or (0, 0))[0] == 12 else 227) << 10


def default_device() -> str:
    """Where a model goes when nobody says: the first CUDA device, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def rank() -> int:
    """The number of this process among those of torch.distributed; 0 where it is alone."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()
