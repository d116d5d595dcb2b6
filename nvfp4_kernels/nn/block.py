"""One layer: x + mixer(norm(x))."""

from torch import Tensor, nn

from nvfp4_kernels.nn.moe import MLP, Balance, MoE
from nvfp4_kernels.nn.norm import RMSNorm


class Block(nn.Module):
    """A pre-norm residual layer around one mixer: Mamba2, Attention, MoE or MLP."""

    def __init__(self, hidden: int, mixer: nn.Module, eps: float = 1e-5):
        super().__init__()
        self.norm = RMSNorm(hidden, eps)
        self.mixer = mixer

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, state=None) -> tuple[Tensor, Balance | None]:
        """x: [batch, length, hidden]. Returns the new x and, of a mixture of experts, its balance.

        state: an AttentionState or Mamba2State of the tokens before x, or None.
        """
        if isinstance(self.mixer, MoE):  # not match: torch 2.10 traces no class patterns
            y, balance = self.mixer(self.norm(x))
        elif isinstance(self.mixer, MLP):
            y, balance = self.mixer(self.norm(x)), None
        else:
            y, balance = self.mixer(self.norm(x), cu_seqlens, state), None
        return x + y, balance
