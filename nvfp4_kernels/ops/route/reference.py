"""Top-k of the biased sigmoid scores, weights from the unbiased ones, and a stable sort by expert."""

import torch
from torch import Tensor


def refuses(logits, bias, top_k, scale, n_group, topk_group, normalize) -> str | None:
    return None


def run(
    logits: Tensor, bias: Tensor | None, top_k: int, scale: float, n_group: int, topk_group: int, normalize: bool
) -> tuple[Tensor, ...]:
    scores = _scores(logits)
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


def backward(
    dweights: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scale: float,
    n_group: int,
    topk_group: int,
    normalize: bool,
) -> Tensor:
    """The gradient of the logits. With w = scale s / S, S the sum: ds = scale (dw - <dw, s> / S) / S; dlogit = ds s (1 - s)."""
    scores = _scores(logits)
    indices = choose(scores if bias is None else scores + bias, top_k, n_group, topk_group)
    chosen = scores.gather(1, indices)
    if normalize:
        total = chosen.sum(1, keepdim=True) + 1e-20
        dweights = (dweights - (dweights * chosen / total).sum(1, keepdim=True)) / total
    dchosen = dweights * scale * chosen * (1 - chosen)
    return torch.zeros_like(scores).scatter_(1, indices, dchosen).to(logits.dtype)


def choose(scores: Tensor, top_k: int, n_group: int, topk_group: int) -> Tensor:
    """The experts with the best scores, best first; with groups, only from the topk_group best of them."""
    if n_group > 1:
        groups = scores.unflatten(1, (n_group, scores.shape[1] // n_group))
        best = _best(groups.topk(min(2, groups.shape[2]), dim=2).values.sum(2), topk_group)
        allowed = torch.zeros(groups.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, True)
        scores = groups.masked_fill(~allowed[:, :, None], -torch.inf).flatten(1)
    return _best(scores, top_k)


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the largest of each row, equal ones in order: topk, which is faster, promises no order."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count].contiguous()


def _scores(logits: Tensor) -> Tensor:
    return torch.sigmoid(logits if logits.dtype == torch.float64 else logits.float())
