"""From logits to tokens. A request's draws are a pure function of its seed and the position of the token that is drawn.

So the same seed gives the same text whatever else is in the batch, as far as the logits do not depend on it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nvfp4_kernels.formats.philox import WORD, philox4x32

# The four words of a position's draw. A plain token takes TOKEN; speculative decoding draws a draft, asks whether it is
# accepted, and draws what comes in its place.
TOKEN, DRAFT, ACCEPT, INSTEAD = range(4)
_BLOCK = 128  # positions whose draws are made together: Philox in torch costs 0.5 ms a call, whether of 1 or of 1000


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 is greedy. top_k: draw from the k likeliest (None: all; ties by index). top_p: from the fewest likeliest
    that have this share of the probability together. min_p: from those at least this share as likely as the likeliest.
    repetition_penalty: divides positive logits of tokens that are in the sequence, prompt included, and multiplies negative
    ones. seed: of the draws. Order as in transformers: penalty, temperature, top_k, top_p, min_p.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        def demand(holds: bool, name: str, allowed: str) -> None:
            if not holds:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: {allowed}")

        demand(0 <= self.temperature < math.inf, "temperature", "0 (greedy) or more")
        demand(self.top_k is None or self.top_k >= 1, "top_k", "at least 1, or None for all")
        demand(0 < self.top_p <= 1, "top_p", "above 0, at most 1 (all)")
        demand(0 <= self.min_p <= 1, "min_p", "0 (all) to 1")
        demand(0 < self.repetition_penalty < math.inf, "repetition_penalty", "above 0; 1 for none")
        demand(0 <= self.seed < 1 << 63, "seed", "0 to 2^63 - 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class Draws:
    """The uniform numbers of one seed, four for each position."""

    def __init__(self, seed: int):
        self.seed = seed
        self._blocks: dict[int, list[list[float]]] = {}

    def at(self, position: int, word: int) -> float:
        """In (0, 1), a multiple of 2^-33."""
        block, place = divmod(position, _BLOCK)
        if block not in self._blocks:
            self._blocks = {b: d for b, d in self._blocks.items() if b >= block - 1} | {block: self._make(block)}
        return self._blocks[block][place][word]

    def _make(self, block: int) -> list[list[float]]:
        counter = torch.arange(block * _BLOCK, (block + 1) * _BLOCK)
        zero, key = torch.zeros((), dtype=torch.int64), torch.tensor([self.seed & WORD, self.seed >> 32])
        words = philox4x32((counter & WORD, counter >> 32, zero, zero), (key[0], key[1]))
        return ((torch.stack(words, 1).double() + 0.5) / (WORD + 1)).tolist()


class Shaper:
    """Turns logits [rows, vocab] into the probabilities that the rows' Samplings draw from."""

    def __init__(self, samplings: Sequence[Sampling], device=None):
        self.greedy = all(s.greedy for s in samplings)
        self.penalized = any(s.repetition_penalty != 1 for s in samplings)
        self.top_k = max((s.top_k or math.inf for s in samplings if not s.greedy), default=1)
        self.limits_k = any(s.top_k for s in samplings)
        self.limits_p, self.limits_min = any(s.top_p < 1 for s in samplings), any(s.min_p > 0 for s in samplings)

        def column(values) -> Tensor:
            return torch.tensor(list(values), dtype=torch.float32, device=device)[:, None]

        self._greedy = column(s.greedy for s in samplings).bool()
        self._some_greedy = any(s.greedy for s in samplings)
        self._temperature = column(s.temperature or 1.0 for s in samplings)
        self._k = column(min(s.top_k or WORD, WORD) for s in samplings)
        self._p, self._min = column(s.top_p for s in samplings), column(s.min_p for s in samplings)
        self._penalty = column(s.repetition_penalty for s in samplings)

    def penalize(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """fp32 logits. seen: bool [rows, vocab], the tokens of each row's sequence; needed where `penalized`."""
        logits = logits.float()
        if not self.penalized:
            return logits
        return torch.where(seen, torch.where(logits > 0, logits / self._penalty, logits * self._penalty), logits)

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """fp32 [rows, vocab]; a greedy row has a one at its largest logit (the first of equals)."""
        logits = self.penalize(logits, seen)
        best = logits.argmax(-1, keepdim=True) if self._some_greedy else None
        if self.greedy:
            return torch.zeros_like(logits).scatter_(1, best, 1.0)
        p = self._shaped((logits - logits.amax(-1, keepdim=True)) / self._temperature)
        return p if best is None else torch.where(self._greedy, torch.zeros_like(p).scatter_(1, best, 1.0), p)

    def _shaped(self, logits: Tensor) -> Tensor:
        if self.limits_k or self.limits_p:
            k = int(min(self.top_k, logits.shape[1]))
            values, ids = (
                t[:, :k] for t in logits.sort(descending=True, stable=True)
            )  # topk promises no order of equals
            values = values.masked_fill(torch.arange(k, device=logits.device) >= self._k, -math.inf)
            p = values.softmax(-1)
            p = p.masked_fill(p.cumsum(-1) - p >= self._p, 0)  # the probability of all likelier ones already suffices
            p = p.masked_fill(p < self._min * p[:, :1], 0)
            return torch.zeros_like(logits).scatter_(1, ids, p / p.sum(-1, keepdim=True))
        p = logits.softmax(-1)
        if self.limits_min:
            p = p.masked_fill(p < self._min * p.amax(-1, keepdim=True), 0)
            p = p / p.sum(-1, keepdim=True)
        return p


def draw(probabilities: Tensor, uniforms: list[float]) -> list[int]:
    """Token ids: for each row the one in whose share of [0, 1), in the order of the ids, the uniform number falls."""
    sums = probabilities.double().cumsum(-1)
    wanted = torch.tensor(uniforms, dtype=torch.float64, device=sums.device)[:, None] * sums[:, -1:]
    return torch.searchsorted(sums, wanted, right=True).clamp_(max=sums.shape[1] - 1)[:, 0].tolist()
