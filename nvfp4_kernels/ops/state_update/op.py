"""state_update: one token of selective_scan, the state changed in place."""

import math

from torch import Tensor

from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops.selective_scan.op import check_per_head


def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    """state <- exp(A dt) state + dt x B^T;  returns y = state C + D x, times silu(z) where given.

    state: float [batch, heads, head_dim, state], written in place. x: [batch, heads, head_dim]. dt: [batch, heads].
    A, dt_bias: [heads]. B, C: [batch, groups, state]. D: [heads] or [heads, head_dim]. z: as x. As in selective_scan.
    Math in fp32 (fp64 for fp64 x); the state is rounded once, on the store. Returns y of the shape and dtype of x.
    Not differentiable: generation alone uses it. Raises TypeError or ValueError naming the argument.
    """
    require(
        isinstance(x, Tensor) and x.is_floating_point(),
        "x",
        getattr(x, "dtype", type(x).__name__),
        "a floating-point tensor",
        TypeError,
    )
    require(x.dim() == 3, "x", f"shape {list(x.shape)}", "[batch, heads, head_dim]")
    batch, heads, head_dim = x.shape
    require(tuple(dt.shape) == (batch, heads), "dt", f"shape {list(dt.shape)}", str([batch, heads]))
    require(B.dim() == 3 and B.shape[0] == batch, "B", f"shape {list(B.shape)}", f"[{batch}, groups, state]")
    require(heads % max(B.shape[1], 1) == 0, "B", f"{B.shape[1]} groups", f"a divisor of {heads} heads")
    require(C.shape == B.shape, "C", f"shape {list(C.shape)}", f"{list(B.shape)}, as B")
    shape = (batch, heads, head_dim, B.shape[2])
    require(tuple(state.shape) == shape, "state", f"shape {list(state.shape)}", str(list(shape)))
    check_per_head(x, A, D, z, dt_bias)
    arguments = (state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit)
    return select("state_update", *arguments).run(*arguments)
