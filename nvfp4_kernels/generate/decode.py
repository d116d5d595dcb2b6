"""A token for each of some sequences: one function of tensors alone, run as it stands or, on CUDA devices, as a CUDA graph.

What differs from step to step (tokens, slots, lengths, seeds, random numbers, the numbers of the samplings) lies in tensors
that are written anew; what a graph is made for is a Shape. So that few shapes do, there a step has rows without a sequence,
and keys are looked at in powers of two of pages.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nvfp4_kernels.generate.graph import recorder
from nvfp4_kernels.generate.sample import TOKEN, Form, Sampling, Shaper, numbers
from nvfp4_kernels.generate.speculative import seen_tokens
from nvfp4_kernels.generate.state import PAGE, Decode, Pool, whole_pages

MOST_STEPS = 32  # that are kept, graphs and inputs; the one made first goes first
ABSENT = (0, -1, 0, 0)  # token, slot, position and seed of a row without a sequence


class Shape(NamedTuple):
    """rows, reach, leading: as in Decode. form: of the samplings."""

    rows: int
    reach: int
    leading: bool
    form: Form


class Step:
    """The inputs of one Shape, and the function of them."""

    def __init__(self, model, pool: Pool, shape: Shape, padded: bool, stochastic: bool):
        self.model, self.pool, self.shape = model, pool, shape
        self.padded, self.stochastic = padded, stochastic
        rows, device = shape.rows, pool.device
        self.whole = torch.tensor(ABSENT, device=device)[:, None].repeat(1, rows)
        self.uniforms = torch.full((rows,), 0.5, dtype=torch.float64, device=device)
        self.numbers = torch.tensor(numbers([Sampling()] * rows), dtype=torch.float32, device=device)
        self.shaper = Shaper(shape.form, self.numbers)
        vocab = model.config.vocab_size
        self.seen = torch.zeros(rows, vocab, dtype=torch.bool, device=device) if shape.form.penalized else None
        self.graph = None
        self._samplings: list[Sampling | None] = [None] * rows

    @torch.no_grad()
    def run(self) -> Tensor:
        """The next token of each row, int64 [rows]. Reads nothing on the host and sends nothing from there."""
        token, slot, position, seed = self.whole
        noise = torch.stack((seed, position), 1) if self.stochastic else None
        shape = self.shape
        self.pool.step = Decode(slot, position[:, None], shape.reach, shape.leading, self.padded, noise=noise)
        hidden = self.model.hidden(token[:, None], state=self.pool.layers)[:, 0]
        return self.shaper.choose(self.model.lm_head(hidden), self.seen, self.uniforms)

    def fill(self, requests: Sequence, places: Sequence[int]) -> None:
        """The inputs for these requests, each in the row of its place."""
        rows = [ABSENT] * self.shape.rows
        for place, r in zip(places, requests, strict=True):
            rows[place] = (r.tokens[-1], r.slot, r.position - 1, r.sampling.seed)
        self.whole.copy_(torch.tensor(rows).t())
        if not self.shape.form.greedy:
            uniforms = [0.5] * self.shape.rows
            for place, r in zip(places, requests, strict=True):
                uniforms[place] = r.draws.at(r.position, TOKEN)
            self.uniforms.copy_(torch.tensor(uniforms, dtype=torch.float64))
        self._fill_samplings(requests, places)
        if self.seen is not None:
            seen = seen_tokens(requests, self.shaper)
            for place, row in zip(places, seen, strict=True):
                self.seen[place] = row

    def _fill_samplings(self, requests: Sequence, places: Sequence[int]) -> None:
        wanted = list(self._samplings)
        for place, r in zip(places, requests, strict=True):
            wanted[place] = r.sampling
        if wanted != self._samplings:
            self._samplings = wanted
            self.numbers.copy_(torch.tensor(numbers([s or Sampling() for s in wanted]), dtype=torch.float32))


class Decoder:
    """Decodes with a served model and its pool. `record` makes graphs of functions (graph.recorder); None: there are none."""

    def __init__(self, model, pool: Pool, stochastic: bool):
        self.model, self.pool, self.stochastic = model, pool, stochastic
        self.record = recorder(pool.device)
        self._steps: dict[Shape, Step] = {}
        self._capacity = pool.capacity
        self._form: tuple[list[Sampling], Form] | None = None

    def __call__(self, requests: Sequence) -> list[int]:
        """The next token of each of these requests, which have one that the model has not seen."""
        given, requests = requests, sorted(requests, key=lambda r: r.slot)
        shape, places = self._shape(requests)
        self.pool.reserve(shape.reach)
        if self._capacity != self.pool.capacity:  # keys and values lie elsewhere now, and graphs write where they lay
            self._steps.clear()
            self._capacity = self.pool.capacity
        step = self._steps.get(shape) or self._prepare(shape)
        step.fill(requests, places)
        for r in requests:
            self.pool.lengths[r.slot] += 1
        tokens = (step.run() if step.graph is None else step.graph.replay()).tolist()
        by_slot = {r.slot: tokens[place] for r, place in zip(requests, places, strict=True)}
        return [by_slot[r.slot] for r in given]

    def _shape(self, requests: Sequence) -> tuple[Shape, list[int]]:
        slots, samplings = [r.slot for r in requests], [r.sampling for r in requests]
        if self._form is None or self._form[0] != samplings:
            self._form = samplings, Form.of(samplings)
        reach = whole_pages(max(self.pool.lengths[slot] for slot in slots) + 1)
        rows = len(slots)
        if self.record is not None:
            rows = min(bucket(rows), self.pool.slots)
            reach = PAGE << (reach // PAGE - 1).bit_length()
        leading = slots == list(range(rows)) or self.record is not None and slots[-1] < rows
        return Shape(rows, reach, leading, self._form[1]), slots if leading else list(range(len(slots)))

    def _prepare(self, shape: Shape) -> Step:
        step = Step(self.model, self.pool, shape, self.record is not None, self.stochastic)
        if self.record is not None:
            step.graph = self.record(step.run)  # of rows without sequences: it leaves no trace
            if step.graph is None:
                self.record = None
        while len(self._steps) >= MOST_STEPS:
            self._steps.pop(next(iter(self._steps)))
        self._steps[shape] = step
        return step


def bucket(rows: int) -> int:
    """1, 2, 4, 8 and multiples of 8: rows of a graph that serves so many sequences."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8
