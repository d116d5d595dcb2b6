"""Multi-token prediction: one block of layers that, used d times over, predicts the token d further on."""

import torch
from torch import Tensor, nn

from nvfp4_kernels.nn.block import Block
from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.nn.moe import Balance
from nvfp4_kernels.nn.norm import RMSNorm


class MTP(nn.Module):
    """hidden' = final_layernorm(layers(eh_proj(concat(enorm(embedding of the next token), hnorm(hidden))))).

    `hidden` is the decoder's output after its last norm, or this block's own at the depth before. The first layer carries
    enorm, hnorm and eh_proj, the last one final_layernorm: the names of the published checkpoints.
    """

    def __init__(self, hidden: int, blocks: list[Block], eps: float = 1e-5):
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.layers[0].enorm = RMSNorm(hidden, eps)
        self.layers[0].hnorm = RMSNorm(hidden, eps)
        self.layers[0].eh_proj = Linear(2 * hidden, hidden)
        self.layers[-1].final_layernorm = RMSNorm(hidden, eps)

    def forward(
        self, hidden: Tensor, embedding: Tensor, cu_seqlens: Tensor | None = None, state: list | None = None
    ) -> tuple[Tensor, list[Balance]]:
        """hidden, embedding: [batch, length, hidden]; embedding[t] is of the token after the last one hidden[t] has seen.

        state: one for each layer, of the tokens before, as HybridModel takes it; None: there are none.
        """
        first, last = self.layers[0], self.layers[-1]
        x = first.eh_proj(torch.cat([first.enorm(embedding), first.hnorm(hidden)], -1))
        balances = []
        for layer, past in zip(self.layers, state or [None] * len(self.layers), strict=True):
            x, balance = layer(x, cu_seqlens, past)
            balances += [balance] if balance else []
        return last.final_layernorm(x), balances


def ahead(tokens: Tensor, depth: int, fill: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """tokens [batch, length] moved `depth` to the left; `fill` where that leaves the row or the document."""
    length = tokens.shape[1]
    moved = torch.full_like(tokens, fill)
    moved[:, : max(length - depth, 0)] = tokens[:, depth:]
    if cu_seqlens is not None:
        places = torch.arange(tokens.numel(), device=tokens.device)
        ends = cu_seqlens.long()[1:]
        end = ends[torch.bucketize(places, ends, right=True)]
        moved = moved.masked_fill((places + depth >= end).view_as(tokens), fill)
    return moved
