"""One token from logits."""

import torch
from torch import Tensor


def choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """logits: [vocab]. temperature 0 takes the largest; top_k keeps the k largest (None: all), ties by index."""
    if temperature == 0:
        return int(logits.argmax())
    logits = logits.float().cpu()  # drawn on the CPU, so that a seed means the same text on every device
    if top_k is not None and top_k < len(logits):
        kept = torch.topk(logits, top_k).indices
        logits = torch.full_like(logits, -torch.inf).index_copy_(0, kept, logits[kept])
    return int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))
