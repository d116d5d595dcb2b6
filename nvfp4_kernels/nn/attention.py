"""Grouped-query attention, causal, without positions of any kind; documents packed into one row never see each other."""

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.ops._device import slow_in_16_bits
from nvfp4_kernels.ops._library import unwrapped


@dataclass
class AttentionState:
    """The keys and values of the tokens so far, [batch, tokens, num_kv_heads, head_dim]; None before the first."""

    k: Tensor | None = None
    v: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Takes in further keys and values; returns the attention of their queries to all so far, as `attend`."""
        self.k = k if self.k is None else torch.cat([self.k, k], 1)
        self.v = v if self.v is None else torch.cat([self.v, v], 1)
        return attend(q, self.k, self.v)


class Attention(nn.Module):
    """o_proj(softmax(q k^T / sqrt(head_dim)) v), num_kv_heads shared by num_heads / num_kv_heads query heads each."""

    def __init__(self, hidden: int, num_heads: int, num_kv_heads: int, head_dim: int, bias: bool = False):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = Linear(hidden, num_heads * head_dim, bias)
        self.k_proj = Linear(hidden, num_kv_heads * head_dim, bias)
        self.v_proj = Linear(hidden, num_kv_heads * head_dim, bias)
        self.o_proj = Linear(num_heads * head_dim, hidden, bias)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, state: AttentionState | None = None) -> Tensor:
        """x: [batch, length, hidden]. cu_seqlens: int [documents + 1] over batch * length tokens, row boundaries included.

        state: an AttentionState, or what has its `attend`, of the tokens before x, to which those of x are added; rows are
        then documents.
        """
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if state is not None:
            y = state.attend(q, k, v)
        else:
            y = attend(q, k, v) if cu_seqlens is None else attend_packed(q, k, v, cu_seqlens.tolist())
        return self.o_proj(y.flatten(-2))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [batch, length, heads, head_dim], each row by itself; the queries belong to the last tokens of k."""
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    earlier = k.shape[2] - q.shape[1]
    if earlier == 0:
        wide = [t.float() for t in (q.transpose(1, 2), k, v)] if _wider(q, k, v) else (q.transpose(1, 2), k, v)
        return F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True).to(q.dtype).transpose(1, 2)
    return attend_seen(q, k, v, torch.ones(1, q.shape[1], k.shape[2], dtype=torch.bool, device=q.device).tril(earlier))


def _wider(*operands: Tensor) -> bool:
    """Whether attention is made in fp32, from which it is rounded once: where gradients are wanted and torch multiplies 16 bits
    without instructions for them. Measured on an EPYC with AVX2 alone, bf16, 8 rows of 256 tokens, 4 heads of 32 over 2, and 2
    rows of 512 tokens, 8 heads of 64 over 2: its backward is 3.5 and 4.7 times as fast so, its forward as fast."""
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    halves = (torch.bfloat16, torch.float16)
    return wanted and all(t.is_cpu and t.dtype in halves and unwrapped(t) for t in operands) and slow_in_16_bits()


def attend_seen(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention of q [batch, queries, heads, head_dim] to those of k, v [batch, kv_heads, tokens, head_dim] that `seen`, bool
    [batch or 1, queries, tokens], allows.

    The query heads that share a key are rows of one product. enable_gqa would copy each key for each of them: measured on
    two cores, bf16, 8 rows of 512 tokens, 8 heads over 2: 0.2 ms so, 3.9 ms with enable_gqa.
    """
    (batch, queries, _, head_dim), shared = q.shape, k.shape[1]
    rows = q.reshape(batch, queries, shared, -1, head_dim).permute(
        0, 2, 3, 1, 4
    )  # [batch, kv_heads, share, queries, ...]
    share = rows.shape[2]
    mask = seen[:, None, None].expand(-1, -1, share, -1, -1).flatten(2, 3)
    y = F.scaled_dot_product_attention(rows.flatten(2, 3), k, v, attn_mask=mask)
    return y.view(batch, shared, share, queries, head_dim).permute(0, 3, 1, 2, 4).reshape(q.shape)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, bounds: list[int]) -> Tensor:
    """The same for documents at `bounds` of the batch * length tokens: one call for all documents of one length."""
    by_length = defaultdict(list)
    for start, end in zip(bounds, bounds[1:], strict=False):
        by_length[end - start].append(start)
    by_length.pop(0, None)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    places, parts = [], []
    for length, starts in by_length.items():
        rows = (torch.tensor(starts)[:, None] + torch.arange(length)).to(q.device)
        parts.append(attend(*(t[rows] for t in flat)).flatten(0, 1))
        places.append(rows.flatten())
    if len(parts) == 1 and bounds[1] - bounds[0] == q.shape[1]:
        return parts[0].view_as(q)
    back = torch.cat(places).argsort()
    return torch.cat(parts).index_select(0, back).view_as(q)
