"""Batched generation: sequences enter, are read, grow a token (or several) a step, and leave; each in a slot of the pool.

The slots are independent of each other: what a sequence says depends on its prompt, its Sampling and the model. In fp32 that is
so for the text (tested). In bf16, on a CPU, it is so for decoding up to 48 rows a step, or 128 with NVFP4 weights; prompts that
are read together are multiplied together, by products whose last bits may depend on how many rows they have.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from operator import index

import torch
from torch import Tensor

from nvfp4_kernels.generate.decode import Decoder
from nvfp4_kernels.generate.sample import TOKEN, Draws, Sampling, Shaper, draw
from nvfp4_kernels.generate.speculative import Acceptance, Drafter, judge, mark, seen_tokens
from nvfp4_kernels.generate.state import STATE_DTYPES, Pool, cache_scales
from nvfp4_kernels.generate.weights import serving
from nvfp4_kernels.model.hybrid import HybridModel
from nvfp4_kernels.ops._check import require


class Request:
    """A sequence, as Engine.add gives it: `tokens` are the new ones so far; `finished` is None while it grows, then "stop",
    "length", "cancelled", or "failed": a step of its engine raised an error."""

    def __init__(self, prompt: list[int], sampling: Sampling, max_new_tokens: int, stop_ids: frozenset[int]):
        self.prompt, self.sampling, self.max_new_tokens, self.stop_ids = prompt, sampling, max_new_tokens, stop_ids
        self.tokens: list[int] = []
        self.finished: str | None = None
        self.slot: int | None = None
        self.read = 0  # tokens of the prompt that the model has seen
        self.draws = Draws(sampling.seed)
        self.hidden: Tensor | None = None  # the model's states that the drafter has not seen
        self.seen: Tensor | None = None  # bool [vocab], where a penalty asks for it

    @property
    def position(self) -> int:
        """Of the next token to be drawn."""
        return len(self.prompt) + len(self.tokens)

    def last(self, count: int) -> list[int]:
        return (self.prompt[-count:] + self.tokens)[-count:]

    def take(self, tokens: list[int]) -> list[int]:
        """Adds drawn tokens up to where the sequence ends; returns those."""
        for i, token in enumerate(tokens):
            if token in self.stop_ids:
                self.finished = "stop"
                return tokens[:i]
            self.tokens.append(token)
            if self.seen is not None:
                self.seen[token] = True
            if len(self.tokens) == self.max_new_tokens:
                self.finished = "length"
                return tokens[: i + 1]
        return tokens


@dataclass(frozen=True)
class Event:
    """What a step gave a request. finished: None, "stop" (one of stop_ids came) or "length" (max_new_tokens)."""

    request: Request
    tokens: list[int]
    finished: str | None


class Engine:
    """Generates with a HybridModel, for up to `slots` sequences at once; more wait.

    prefill_chunk: tokens of prompts read in one step, at most; longer ones take several steps, and those that already
    grow go on in between. state_dtype: of the SSM states, "fp32", "bf16" or "fp16"; with stochastic their rounding is
    stochastic, from each request's seed (fp16 so is what Nemotron 3 is served with). speculative: tokens drafted by the MTP
    block at each step; 0: none. kv_dtype: of keys and values; None: the activations'. "fp8": E4M3 with the scales that the
    checkpoint has for each layer (k_scale, v_scale), 1 where it has none; half the memory of bf16. "checkpoint": fp8 where the
    checkpoint says so. Those of the MTP block, whose drafts are verified, stay in the activations' dtype.
    pack_prompts: whether short prompts are read together, up to prefill_chunk tokens, or each in a step of its own, so that no
    product's shape, and with it its rounding, depends on who else is there. None: together on a GPU alone, whose libraries
    round by shape in decoding too.
    On CUDA devices a step that grows sequences by a token each is one CUDA graph, made when its shape is first met (decode.py);
    reading prompts and speculative decoding are not.
    One thread steps and cancels; `add` may be called by others meanwhile.
    The engine works on a copy of the model, which shares what needs no other form (weights.serving): later training of the
    model does not reach it. Raises ValueError or TypeError naming the argument.
    """

    @torch.inference_mode(False)  # what is kept here is written to in either mode later, and so it is below
    def __init__(
        self,
        model,
        slots: int = 8,
        prefill_chunk: int = 2048,
        state_dtype: str = "fp32",
        stochastic: bool = False,
        speculative: int = 0,
        kv_dtype: str | None = None,
        pack_prompts: bool | None = None,
    ):
        require(isinstance(model, HybridModel), "model", type(model).__name__, "an nk.HybridModel", TypeError)
        for name, value, least in (
            ("slots", slots, 1), ("prefill_chunk", prefill_chunk, 1), ("speculative", speculative, 0),
        ):  # fmt: skip
            require(isinstance(value, Integral), name, repr(value), "an int", TypeError)
            if value < least:
                raise ValueError(f"{name}: got {value}; allowed: at least {least}")
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype: got {state_dtype!r}; allowed: {', '.join(STATE_DTYPES)}")
        if stochastic and state_dtype == "fp32":
            raise ValueError(
                "stochastic: got True for fp32 states; allowed: state_dtype 'fp16' or 'bf16', which are rounded"
            )
        if kv_dtype not in (None, "fp8", "checkpoint"):
            raise ValueError(f"kv_dtype: got {kv_dtype!r}; allowed: None, 'fp8', 'checkpoint'")
        fp8 = kv_dtype == "fp8" or kv_dtype == "checkpoint" and model.kv_cache_algorithm == "FP8"
        self.model = serving(model)
        self.vocab, self.prefill_chunk, self.stochastic = model.config.vocab_size, prefill_chunk, stochastic
        self.device = self.model.backbone.embeddings.weight.device
        self.pack_prompts = self.device.type != "cpu" if pack_prompts is None else pack_prompts
        scales = cache_scales(model.backbone.layers, self.device) if fp8 else None
        blocks, dtype = self.model.backbone.layers, model.config.dtype
        self.pool = Pool(blocks, slots, dtype, STATE_DTYPES[state_dtype], self.device, scales)
        self.decoder = Decoder(self.model, self.pool, stochastic)
        self.drafter = Drafter(self.model, slots, speculative) if speculative else None
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._free = list(range(slots))
        self._shaper: tuple[tuple, Shaper] | None = None

    @torch.inference_mode(False)
    def add(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        max_new_tokens: int = 256,
        stop_ids: Sequence[int] = (),
    ) -> Request:
        """Queues a prompt, token ids, for `step` to work on. stop_ids: tokens that end it, and are not among its own.

        Raises TypeError or ValueError naming the argument.
        """
        prompt, stop_ids = _token_ids("prompt", prompt), _token_ids("stop_ids", stop_ids)
        require(isinstance(sampling, Sampling | None), "sampling", type(sampling).__name__, "nk.Sampling", TypeError)
        require(isinstance(max_new_tokens, Integral), "max_new_tokens", max_new_tokens, "an int", TypeError)
        if not prompt:
            raise ValueError("prompt: got no token; allowed: at least one")
        for name, tokens in (("prompt", prompt), ("stop_ids", stop_ids)):
            outside = next((token for token in tokens if not 0 <= token < self.vocab), None)
            if outside is not None:
                raise ValueError(f"{name}: got {outside}; allowed: 0 to {self.vocab - 1}, the model's vocabulary")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}; allowed: at least 1")
        request = Request(prompt, sampling or Sampling(), max_new_tokens, frozenset(stop_ids))
        self.waiting.append(request)
        return request

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def acceptance(self) -> Acceptance | None:
        """Of the drafts so far; None without speculative decoding."""
        return self.drafter and self.drafter.acceptance

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self) -> list[Event]:
        """Reads a chunk of the prompts that are there, and grows every sequence whose prompt has been read.

        After an error (out of memory, Ctrl-C) the engine goes on with what waits; the sequences in slots are "failed", since
        some layers may have seen a token that others have not.
        """
        while self.waiting and self._free:
            request = self.waiting.popleft()
            request.slot = self._free.pop(0)
            self.running.append(request)
        growing = [r for r in self.running if r.tokens]
        reading = [r for r in self.running if r.read < len(r.prompt)]
        try:
            for request in reading:  # not in `add`, whose thread may have none of the device while a graph is recorded
                if request.seen is None and request.sampling.repetition_penalty != 1:
                    request.seen = torch.zeros(self.vocab, dtype=torch.bool, device=self.device)
                    request.seen[request.prompt] = True
            events = self._read(reading) if reading else []
            if growing:
                events += self._speculate(growing) if self.drafter else self._grow(growing)
        except BaseException:
            for request in list(self.running):
                request.finished = "failed"
                self._release(request)
            raise
        for event in events:
            if event.finished:
                self._release(event.request)
        return events

    def run(self) -> Iterator[Event]:
        """Steps until nothing is left to do."""
        while self.busy:
            yield from self.step()

    def cancel(self, request: Request) -> None:
        """Takes a request out; its slot serves the next one. Raises ValueError for a request of another engine."""
        if request.finished:
            return
        waits = request in self.waiting
        require(waits or request in self.running, "request", "one of another engine", "what this engine's add gave")
        request.finished = "cancelled"
        if waits:
            self.waiting.remove(request)
        else:
            self._release(request)

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        self.pool.clear(request.slot)
        if self.drafter:
            self.drafter.pool.clear(request.slot)
        self._free = sorted([*self._free, request.slot])
        request.hidden = None

    def _read(self, requests: list[Request]) -> list[Event]:
        """One forward over the next tokens of a prompt, or of several packed, first come, first served."""
        room, parts = self.prefill_chunk, []
        for request in requests:
            part = request.prompt[request.read : request.read + self.prefill_chunk]
            if len(part) > room:  # whole chunks alone: where a prompt is cut must not depend on its neighbours
                break
            parts.append((request, part))
            room -= len(part) if self.pack_prompts else room
        ids = torch.tensor([[token for _, part in parts for token in part]], device=self.device)
        slots, counts = [request.slot for request, _ in parts], [len(part) for _, part in parts]
        hidden = self.model.hidden(ids, state=self.pool.begin(slots, counts, packed=True))[0].split(counts)
        if self.drafter:
            self._let_drafter_read(parts, hidden)
        whole = []
        for (request, part), states in zip(parts, hidden, strict=True):
            request.read += len(part)
            if request.read == len(request.prompt):
                request.hidden = states[-1:].clone()  # a view would hold those of all that was read
                whole.append(request)
        return self._draw(whole, self.model.lm_head(torch.cat([r.hidden for r in whole]))) if whole else []

    def _let_drafter_read(self, parts: list[tuple[Request, list[int]]], hidden: Sequence[Tensor]) -> None:
        known = [
            (request.slot, states[: len(following)], following)
            for (request, part), states in zip(parts, hidden, strict=True)
            if (following := request.prompt[request.read + 1 : request.read + 1 + len(part)])
        ]
        if known:
            self.drafter.read(*map(list, zip(*known, strict=True)))

    def _grow(self, requests: list[Request]) -> list[Event]:
        """A token for each."""
        return _events(requests, self.decoder(requests))

    def _draw(self, requests: list[Request], logits: Tensor) -> list[Event]:
        shaper = self._shaper_of(requests)
        seen = seen_tokens(requests, shaper)
        if shaper.greedy:
            tokens = shaper.penalize(logits, seen).argmax(-1).tolist()
        else:
            uniforms = [request.draws.at(request.position, TOKEN) for request in requests]
            tokens = draw(shaper.probabilities(logits, seen), uniforms)
        return _events(requests, tokens)

    def _speculate(self, requests: list[Request]) -> list[Event]:
        """Several tokens for each: drafts, one pass over all of them, and the states put where the accepted ones end."""
        depth, acceptance = self.drafter.depth, self.drafter.acceptance
        shaper = self._shaper_of(requests)
        drafts, q = self.drafter.propose(requests, shaper)
        ids = torch.tensor([r.tokens[-1:] + row for r, row in zip(requests, drafts, strict=True)], device=self.device)
        slots, counts = [r.slot for r in requests], [depth + 1] * len(requests)
        state = self.pool.begin(slots, counts, keep=True, noise=self._noise(requests))
        hidden = self.model.hidden(ids, state=state)
        logits, seen = self.model.lm_head(hidden), seen_tokens(requests, shaper)
        p = []
        for place in range(depth + 1):
            if place:
                mark(seen, [row[place - 1] for row in drafts])
            p.append(shaper.probabilities(logits[:, place], seen))
        made = judge(requests, drafts, q, torch.stack(p, 1))
        self.pool.commit([len(tokens) for tokens in made])
        events = []
        for request, tokens, states in zip(requests, made, hidden, strict=True):
            request.hidden = states[: len(tokens)]
            acceptance.count(len(tokens) - 1)
            events.append(Event(request, request.take(tokens), request.finished))
        return events

    def _noise(self, requests: list[Request]) -> list[tuple[int, int]] | None:
        """The seed of each, and the place of its next token: the same whether tokens come one by one or several at once."""
        if not self.stochastic:
            return None
        return [(request.sampling.seed, request.position - 1) for request in requests]

    def _shaper_of(self, requests: list[Request]) -> Shaper:
        samplings = tuple(request.sampling for request in requests)
        if self._shaper is None or self._shaper[0] != samplings:
            self._shaper = samplings, Shaper.of(samplings, self.device)
        return self._shaper[1]


def _token_ids(name: str, tokens: Sequence[int]) -> list[int]:
    try:
        return [index(token) for token in tokens]
    except TypeError:
        got = f"shape {list(tokens.shape)}" if isinstance(tokens, Tensor) else repr(tokens)[:60]
        raise TypeError(f"{name}: got {got}; allowed: a sequence of token ids") from None


def _events(requests: list[Request], tokens: list[int]) -> list[Event]:
    return [Event(r, r.take([token]), r.finished) for r, token in zip(requests, tokens, strict=True)]
