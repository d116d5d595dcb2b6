"""The kernels of csrc/causal_conv1d and csrc/selective_scan behind one another."""

from torch import Tensor

from nvfp4_kernels.ops.causal_conv1d import native as conv
from nvfp4_kernels.ops.conv_scan import _in_turn
from nvfp4_kernels.ops.selective_scan import native as scan


def refuses(*arguments) -> str | None:
    return _in_turn.refuses(conv, scan, *arguments)


def run(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return _in_turn.run(conv, scan, *arguments)


def backward(*arguments) -> tuple[Tensor | None, ...]:
    return _in_turn.backward(conv, scan, *arguments)
