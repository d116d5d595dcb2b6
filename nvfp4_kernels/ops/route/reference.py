"""Top-k of the biased sigmoid scores, weights from the unbiased ones, and a stable sort by expert."""

import torch
from torch import Tensor


def refuses(logits, bias, top_k, scale, n_group, topk_group, normalize) -> str | None:
    return None


def run(
    logits: Tensor, bias: Tensor | None, top_k: int, scale: float, n_group: int, topk_group: int, normalize: bool
) -> tuple[Tensor, ...]:
    scores = torch.sigmoid(logits if logits.dtype == torch.float64 else logits.float())
    with torch.no_grad():
        indices = choose(scores if bias is None else scores + bias, top_k, n_group, topk_group)
        order = indices.view(-1).sort(stable=True).indices
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        offsets = torch.zeros(logits.shape[1] + 1, dtype=torch.int64, device=order.device)
        torch.cumsum(torch.bincount(indices.view(-1), minlength=logits.shape[1]), 0, out=offsets[1:])
    weights = scores.gather(1, indices)
    if normalize:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return indices, weights * scale, offsets, inverse.view_as(indices), order


def choose(scores: Tensor, top_k: int, n_group: int, topk_group: int) -> Tensor:
    """The experts with the best scores, best first; with groups, only from the topk_group best of them."""
    if n_group > 1:
        groups = scores.view(scores.shape[0], n_group, -1)
        best = groups.topk(min(2, groups.shape[2]), dim=2).values.sum(2).topk(topk_group, dim=1).indices
        allowed = torch.zeros(groups.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, True)
        scores = groups.masked_fill(~allowed[:, :, None], -torch.inf).flatten(1)
    return scores.topk(top_k, dim=1).indices
