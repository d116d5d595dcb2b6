"""Sampling, a token at a time, by running the whole context again for each: slow and plainly right.

A cached decode (state, convolution window, keys and values) must give the same text as this.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from nvfp4_kernels.generate.sample import choose


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    context: int = 4096,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """New token ids after `prompt_ids`, at most `max_new_tokens`; ends before the first of `stop_ids`.

    temperature: 0 is greedy. top_k: None for all. context: tokens the model looks back at most. on_token: called with
    each id as it comes. Raises ValueError naming the argument.
    """
    vocab = model.config.vocab_size
    if not prompt_ids:
        raise ValueError("prompt_ids: got none; allowed: at least one token")
    outside = next((i for i in prompt_ids if not 0 <= i < vocab), None)
    if outside is not None:
        raise ValueError(f"prompt_ids: got {outside}; allowed: 0 to {vocab - 1}, the model's vocabulary")
    if temperature < 0:
        raise ValueError(f"temperature: got {temperature}; allowed: 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: got {top_k}; allowed: at least 1, or None for all")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    ids = list(prompt_ids)
    try:
        for _ in range(max_new_tokens):
            logits = model(torch.tensor([ids[-context:]], device=device))[0, -1]
            token = choose(logits, temperature, top_k, generator)
            if token in stop_ids:
                break
            ids.append(token)
            if on_token is not None:
                on_token(token)
    finally:
        model.train(training)
    return ids[len(prompt_ids) :]
