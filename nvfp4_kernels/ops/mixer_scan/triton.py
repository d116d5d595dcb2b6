"""The kernels of conv_scan and gated_rms_norm behind one another."""

from torch import Tensor

from nvfp4_kernels.ops.conv_scan import triton as scan
from nvfp4_kernels.ops.gated_rms_norm import triton as norm
from nvfp4_kernels.ops.mixer_scan import _in_turn


def refuses(*arguments) -> str | None:
    return _in_turn.refuses(scan, norm, *arguments)


def run(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return _in_turn.run(scan, norm, *arguments)
