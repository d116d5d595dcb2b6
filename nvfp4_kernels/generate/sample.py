"""From logits to tokens. A request's draws are a pure function of its seed and the position of the token that is drawn.

So the same seed gives the same text whatever else is in the batch, as far as the logits do not depend on it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

from nvfp4_kernels.formats.philox import WORD, philox4x32

# The four words of a position's draw. A plain token takes TOKEN; speculative decoding draws a draft, asks whether it is
# accepted, and draws what comes in its place.
TOKEN, DRAFT, ACCEPT, INSTEAD = range(4)
_LEAST, _MOST = 1e-30, 1e30  # what fp32 divides and multiplies logits by without NaN
_BLOCK = 128  # positions whose draws are made together: Philox in torch costs 0.5 ms a call, whether of 1 or of 1000


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 is greedy. top_k: draw from the k likeliest (None: all; ties by index). top_p: from the fewest likeliest
    that have this share of the probability together. min_p: from those at least this share as likely as the likeliest.
    repetition_penalty: divides positive logits of tokens that are in the sequence, prompt included, and multiplies negative
    ones. seed: of the draws. Order as in transformers: penalty, temperature, top_k, top_p, min_p.
    Raises TypeError or ValueError naming the argument.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        def demand(holds: bool, name: str, allowed: str, error: type[Exception] = ValueError) -> None:
            if not holds:
                raise error(f"{name}: got {getattr(self, name)!r}; allowed: {allowed}")

        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            demand(isinstance(getattr(self, name), Real), name, "a number", TypeError)
        demand(isinstance(self.top_k, Integral | None), "top_k", "an int, or None for all", TypeError)
        demand(isinstance(self.seed, Integral), "seed", "an int", TypeError)
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


class Form(NamedTuple):
    """What a Shaper does, the numbers aside: rows of one form are shaped by the same operations.

    greedy, some_greedy: all rows are, some are. top_k: the largest of the rows. The rest: whether any row asks for it.
    """

    greedy: bool
    some_greedy: bool
    penalized: bool
    limits_k: bool
    limits_p: bool
    limits_min: bool
    top_k: float

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "Form":
        return cls(
            all(s.greedy for s in samplings),
            any(s.greedy for s in samplings),
            any(s.repetition_penalty != 1 for s in samplings),
            any(s.top_k for s in samplings),
            any(s.top_p < 1 for s in samplings),
            any(s.min_p > 0 for s in samplings),
            max((s.top_k or math.inf for s in samplings if not s.greedy), default=1),
        )


def numbers(samplings: Sequence[Sampling]) -> list[list[float]]:
    """A row for each, as Shaper takes them: greedy, temperature, top_k, top_p, min_p, repetition_penalty."""

    def held(x: float) -> float:
        return min(max(x, _LEAST), _MOST)

    return [
        [
            s.greedy,
            held(s.temperature or 1.0),
            min(s.top_k or WORD, WORD),
            held(s.top_p),
            s.min_p,
            held(s.repetition_penalty),
        ]
        for s in samplings
    ]


class Shaper:
    """Turns logits [rows, vocab] into the probabilities that the rows' Samplings draw from.

    given: fp32 [rows, 6], `numbers` of the rows; what is written to it later holds for what is shaped later.
    """

    def __init__(self, form: Form, given: Tensor):
        self.form, self.greedy, self.penalized = form, form.greedy, form.penalized
        self._is_greedy, self._temperature, self._k, self._p, self._min, self._penalty = given.split(1, 1)

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device=None) -> "Shaper":
        return cls(Form.of(samplings), torch.tensor(numbers(samplings), dtype=torch.float32, device=device))

    def choose(self, logits: Tensor, seen: Tensor | None, uniforms: Tensor | None) -> Tensor:
        """Token ids, int64 [rows]. uniforms: float64 [rows], one to be drawn with; not needed where all rows are greedy."""
        if self.greedy:
            return self.penalize(logits, seen).argmax(-1)
        return pick(self.probabilities(logits, seen), uniforms)

    def penalize(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """fp32 logits. seen: bool [rows, vocab], the tokens of each row's sequence; needed where `penalized`."""
        logits = logits.float()
        if not self.penalized:
            return logits
        return torch.where(seen, torch.where(logits > 0, logits / self._penalty, logits * self._penalty), logits)

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """fp32 [rows, vocab]; a greedy row has a one at its largest logit (the first of equals)."""
        logits = self.penalize(logits, seen)
        best = logits.argmax(-1, keepdim=True) if self.form.some_greedy else None
        if self.greedy:
            return torch.zeros_like(logits).scatter_(1, best, 1.0)
        p = self._shaped((logits - logits.amax(-1, keepdim=True)) / self._temperature)
        return p if best is None else torch.where(self._is_greedy.bool(), torch.zeros_like(p).scatter_(1, best, 1.0), p)

    def _shaped(self, logits: Tensor) -> Tensor:
        if self.form.limits_k or self.form.limits_p:
            k = int(min(self.form.top_k, logits.shape[1]))
            values, ids = (
                t[:, :k] for t in logits.sort(descending=True, stable=True)
            )  # topk promises no order of equals
            values = values.masked_fill(torch.arange(k, device=logits.device) >= self._k, -math.inf)
            p = values.softmax(-1)
            p = p.masked_fill(p.cumsum(-1) - p >= self._p, 0)  # the probability of all likelier ones already suffices
            p = p.masked_fill(p < self._min * p[:, :1], 0)
            return torch.zeros_like(logits).scatter_(1, ids, p / p.sum(-1, keepdim=True))
        p = logits.softmax(-1)
        if self.form.limits_min:
            p = p.masked_fill(p < self._min * p.amax(-1, keepdim=True), 0)
            p = p / p.sum(-1, keepdim=True)
        return p


def pick(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Token ids: for each row the one in whose share of [0, 1), in the order of the ids, the uniform number falls.

    uniforms: float64 [rows]. Nothing is read on the host.
    """
    sums = probabilities.double().cumsum(-1)
    found = torch.searchsorted(sums, uniforms[:, None] * sums[:, -1:], right=True)
    return found.clamp_(max=sums.shape[1] - 1)[:, 0]


def draw(probabilities: Tensor, uniforms: list[float]) -> list[int]:
    """The same on the host."""
    return pick(probabilities, torch.tensor(uniforms, dtype=torch.float64, device=probabilities.device)).tolist()
