"""The two ops behind one another."""

from torch import Tensor

from nvfp4_kernels.ops.conv_scan import reference as scan
from nvfp4_kernels.ops.gated_rms_norm import reference as norm
from nvfp4_kernels.ops.mixer_scan import _in_turn


def refuses(*arguments) -> str | None:
    return _in_turn.refuses(scan, norm, *arguments)


def run(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return _in_turn.run(scan, norm, *arguments)
