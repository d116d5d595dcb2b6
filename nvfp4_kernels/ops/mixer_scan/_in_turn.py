"""conv_scan, then gated_rms_norm, by the modules of one backend."""

from types import ModuleType

from torch import Tensor


def refuses(scan: ModuleType, norm: ModuleType, *arguments) -> str | None:
    z, given, rest = _arguments(*arguments)
    return scan.refuses(*given) or norm.refuses(z, z, *rest)


def run(scan: ModuleType, norm: ModuleType, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    z, given, rest = _arguments(*arguments)
    y, *last = scan.run(*given)
    return norm.run(y.flatten(2), z, *rest), *last


def _arguments(
    xBC, z, dt, weight, bias, A, D, dt_bias, norm_weight, conv_state, initial_state, cu_seqlens, groups, low, high, eps,
    chunk_size,
):  # fmt: skip
    """z, what the scan takes, and what the norm takes behind it."""
    states, inner = (conv_state, initial_state, cu_seqlens), z.shape[2]
    state = (xBC.shape[2] - inner) // (2 * groups)
    given = xBC, dt, weight, bias, A, D, dt_bias, *states, groups, state, low, high, chunk_size
    return z, given, (norm_weight, eps, inner // groups, False)
