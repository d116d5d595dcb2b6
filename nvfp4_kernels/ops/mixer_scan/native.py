"""csrc/mixer_scan for GPUs; on the CPU the kernels of conv_scan and gated_rms_norm behind one another."""

from torch import Tensor

from nvfp4_kernels.ops import _cuda
from nvfp4_kernels.ops.conv_scan import native as scan
from nvfp4_kernels.ops.gated_rms_norm import native as norm
from nvfp4_kernels.ops.mixer_scan import _cuda as cuda
from nvfp4_kernels.ops.mixer_scan import _in_turn


def refuses(xBC, *rest) -> str | None:
    return cuda.refuses(xBC, *rest) if _cuda.takes(xBC) else _in_turn.refuses(scan, norm, xBC, *rest)


def run(xBC, *rest) -> tuple[Tensor, Tensor, Tensor]:
    return cuda.run(xBC, *rest) if _cuda.takes(xBC) else _in_turn.run(scan, norm, xBC, *rest)
