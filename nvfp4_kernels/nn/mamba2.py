"""The Mamba-2 mixer: one projection in, short convolution, selective scan, gated norm, one projection out."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nvfp4_kernels.nn.forms import Derived, Deriving
from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.nn.norm import RMSNorm
from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ops.conv_scan.op import conv_scan
from nvfp4_kernels.ops.mixer_scan.op import mixer_scan
from nvfp4_kernels.ops.mixer_step.op import mixer_step


@dataclass
class Mamba2State:
    """What the tokens so far leave behind; its size does not grow with them."""

    conv: Tensor  # [batch, channels, width - 1], the last inputs of the convolution
    ssm: Tensor  # [batch, heads, head_dim, state], fp32

    def mix(self, projected: Tensor, mixer: "Mamba2") -> Tensor:
        """What comes between the projections, for the next tokens of each row; the state is brought up to date in place."""
        if projected.shape[1] == 1:
            return mixer_step(projected, self.conv, self.ssm, *mixer.step_arguments())
        y, self.conv, self.ssm = mixer.scan(projected, self.conv, self.ssm)
        return y


class Mamba2(Deriving):
    """Rows of in_proj: gate z [inner], x [inner], B and C [groups * state] each, dt [heads]; inner = heads * head_dim.

    A_log, D and dt_bias stay fp32. The norm's groups are those of B and C; the gate comes before the norm.
    """

    def __init__(
        self,
        hidden: int,
        heads: int,
        head_dim: int,
        state: int,
        groups: int,
        conv_width: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        eps: float = 1e-5,
        chunk_size: int = 128,
        dt_limit: tuple[float, float] = (0.0, math.inf),
    ):
        super().__init__()
        self.heads, self.head_dim, self.state, self.groups = heads, head_dim, state, groups
        self.chunk_size, self.dt_limit = chunk_size, dt_limit
        inner, conv = heads * head_dim, heads * head_dim + 2 * groups * state
        self.split = (inner, conv, heads)
        self.in_proj = Linear(hidden, sum(self.split), bias)
        self.conv1d = nn.Conv1d(
            conv, conv, conv_width, groups=conv, bias=conv_bias, dtype=torch.float32
        )  # holds the parameters, is never called
        self.A_log = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.norm = RMSNorm(inner, eps, inner // groups)
        self.out_proj = Linear(inner, hidden, bias)
        self._decoding = Derived(_decoding_weights)

    def new_state(self, batch: int, dtype: torch.dtype) -> Mamba2State:
        """The state before the first token."""
        width, device = self.conv1d.weight.shape[2], self.D.device
        return Mamba2State(
            torch.zeros(batch, self.split[1], width - 1, dtype=dtype, device=device),
            torch.zeros(batch, self.heads, self.head_dim, self.state, dtype=torch.float32, device=device),
        )

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, state: Mamba2State | None = None) -> Tensor:
        """x: [batch, length, hidden]. cu_seqlens: int [documents + 1] over batch * length tokens, row boundaries included.

        state: a Mamba2State, or what has its `mix`, of the tokens before x, brought up to date in place; rows are then
        documents.
        """
        require(x.dim() == 3, "x", f"shape {list(x.shape)}", "[batch, length, hidden]")
        both = state is not None and cu_seqlens is not None
        require(
            not both, "cu_seqlens", "boundaries beside a state", "one of the two: with a state each row is a document"
        )
        projected = self.in_proj(x)
        y = self.scan(projected, cu_seqlens=cu_seqlens)[0] if state is None else state.mix(projected, self)
        return self.out_proj(y)

    def scan(
        self,
        projected: Tensor,
        conv_state: Tensor | None = None,
        ssm_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What comes between the projections, from the states before the tokens; and the states after them, as conv_scan."""
        z, xBC, dt = projected.split(self.split, -1)
        weights = self.conv1d.weight[:, 0], self.conv1d.bias, -torch.exp(self.A_log), self.D, self.dt_bias
        states = conv_state, ssm_state, cu_seqlens
        if not torch.is_grad_enabled():
            options = self.norm.weight, self.groups, self.dt_limit, self.norm.eps
            return mixer_scan(xBC, z, dt, *weights, *options, *states, self.chunk_size)
        y, *after = conv_scan(xBC, dt, *weights, self.groups, self.state, self.dt_limit, *states, self.chunk_size)
        return self.norm(y.flatten(-2), z), *after

    def mix(self, projected: Tensor, convolve: Callable, scan: Callable) -> Tensor:
        """Convolution, scan and norm with a state that the two functions keep.

        convolve(xBC, weight, bias) -> xBC. scan(x, dt, A, B, C, D, dt_bias=, dt_limit=, chunk_size=) -> y, as selective_scan.
        """
        z, xBC, dt = projected.split(self.split, -1)
        inner, shared = self.split[0], self.groups * self.state
        x, B, C = convolve(xBC, self.conv1d.weight[:, 0], self.conv1d.bias).split((inner, shared, shared), -1)
        x = x.unflatten(-1, (self.heads, -1))
        B, C = (t.unflatten(-1, (self.groups, -1)) for t in (B, C))
        options = dict(dt_bias=self.dt_bias, dt_limit=self.dt_limit, chunk_size=self.chunk_size)
        return self.norm(scan(x, dt, -torch.exp(self.A_log), B, C, self.D, **options).flatten(-2), z)

    def refresh(self) -> None:
        """Forget what was made of the parameters; needed only after writing through `.data` by hand."""
        self._decoding.clear()

    def step_arguments(self) -> tuple:
        """What mixer_step takes behind the states, `indices` aside."""
        weights = self.conv1d.weight, self.conv1d.bias, self.A_log, self.D, self.dt_bias, self.norm.weight
        return *self._decoding.get(*weights), self.groups, self.dt_limit, self.norm.eps


def _decoding_weights(taps, bias, A_log, D, dt_bias, norm_weight) -> tuple[Tensor | None, ...]:
    """What mixer_step reads, at least fp32 and laid out as its kernel wants it: made once, not for each token."""

    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(torch.promote_types(t.dtype, torch.float32))

    taps = wide(taps[:, 0]).t().contiguous().t()
    return taps, wide(bias), -torch.exp(wide(A_log)), wide(D), wide(dt_bias), wide(norm_weight)
