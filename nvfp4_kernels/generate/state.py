"""What sequences leave behind while they are generated: keys and values, convolution windows, SSM states, in a pool of slots.

A sequence has one slot in every layer for as long as it lives. One forward works on a Step: some slots, and how many tokens
come to each. The pool's `layers` are handed to the model as its `state`; what they do depends on the pool's step.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn

from nvfp4_kernels.formats import e4m3
from nvfp4_kernels.nn.attention import Attention, attend, attend_seen
from nvfp4_kernels.nn.mamba2 import Mamba2
from nvfp4_kernels.ops.causal_conv1d.op import causal_conv1d
from nvfp4_kernels.ops.mixer_step.op import mixer_step
from nvfp4_kernels.ops.state_update.op import state_update

# Keys are allocated and attended to in pages. torch's attention on the CPU sums over blocks of 512 keys: where all of them are
# whole, bits do not depend on the length of the longest sequence in the batch. (In bf16 64 do as well.)
PAGE = 512
MASK = 1 << 22  # which query may see which key: as many pairs at once when a long prompt is read in chunks
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Prefill:
    """Prompts that are read: one sequence's tokens behind the other's in one row.

    slots: of the sequences. starts: how many tokens each of them has. counts: how many more come.
    """

    slots: list[int]
    starts: list[int]
    counts: list[int]
    device: torch.device

    @cached_property
    def indices(self) -> Tensor:
        return torch.tensor(self.slots, device=self.device)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *self.counts], device=self.device).cumsum(0)


@dataclass
class Decode:
    """Sequences that grow: a row each, of equally many tokens. What changes from step to step is in tensors on the device;
    the rest is what a CUDA graph of the step is made for.

    indices: int64 [rows], the slots. padded: some may be -1, rows without a sequence, which leave no trace and whose results
    mean nothing. positions: int64 [rows, tokens], of the coming tokens in their sequences; where a row has no sequence, 0.
    reach: keys that are looked at, whole pages. leading: the slots are 0, 1, 2, ...: then parts of the pool are views.
    keep: the states as they were before stay, to be settled by `Pool.commit`.
    noise: int64 [rows, 2], (seed, offset), for fp16 or bf16 states rounded stochastically; None: to nearest.
    """

    indices: Tensor
    positions: Tensor
    reach: int
    leading: bool = False
    padded: bool = False
    keep: bool = False
    noise: Tensor | None = None

    @cached_property
    def seen(self) -> Tensor:
        """[rows, tokens, reach]: the keys up to each token's own."""
        return torch.arange(self.reach, device=self.positions.device) <= self.positions[:, :, None]

    @cached_property
    def slots(self) -> Tensor:
        """The indices; for a row without a sequence the first slot, which it must not change."""
        return self.indices.clamp(min=0) if self.padded else self.indices

    @cached_property
    def present(self) -> Tensor:
        """bool [rows]: rows with a sequence."""
        return self.indices >= 0

    def of(self, pool: Tensor) -> Tensor:
        """The slots' part of a pooled tensor [slots, ...]."""
        return pool[: len(self.indices)] if self.leading else pool[self.slots]

    def put(self, pool: Tensor, places: tuple, new: Tensor) -> None:
        """pool[places] = new, [rows, ...], but for rows without a sequence. Such a row writes back what is at its place, where
        no sequence writes in the same step."""
        if self.padded:
            new = torch.where(self.present.view(-1, *[1] * (new.dim() - 1)), new, pool[places])
        pool[places] = new


def whole_pages(tokens: int) -> int:
    return -(-tokens // PAGE) * PAGE


class AttentionSlots:
    """Keys and values of one attention layer, [slots, kv_heads, capacity, head_dim], capacity growing by pages.

    scales: fp32 [] of keys and of values: they are kept as codes of E4M3, a byte each, which stand for code * scale. None: in
    `dtype`.
    """

    def __init__(self, pool: "Pool", mixer: Attention, dtype: torch.dtype, scales: tuple[Tensor, Tensor] | None):
        self.pool, self.dtype, self.scales = pool, dtype, scales
        shape, held = (pool.slots, mixer.num_kv_heads, PAGE, mixer.head_dim), torch.uint8 if scales else dtype
        # What each code stands for: measured on a CPU, looking it up is five times as fast as converting it.
        codes = torch.arange(256, dtype=torch.uint8, device=pool.device)
        self._tables = [(e4m3.decode(codes) * scale).to(dtype) for scale in scales or ()]
        # Zeros, not what memory holds: the weight of an unseen key is 0, and 0 times NaN is NaN.
        self.k, self.v = (torch.zeros(shape, dtype=held, device=pool.device) for _ in range(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        step, (k, v) = self.pool.step, self._codes(k, v)
        if isinstance(step, Prefill):
            parts = (t[0].split(step.counts) for t in (q, k, v))
            rows = zip(step.slots, step.starts, *parts, strict=True)
            return torch.cat([self._attend_one(*row) for row in rows])[None]
        places = step.slots[:, None], slice(None), step.positions
        step.put(self.k, places, k)
        step.put(self.v, places, v)
        keys, values = self._values(*(step.of(t[:, :, : step.reach]) for t in (self.k, self.v)))
        if q.shape[1] * q.shape[2] > k.shape[2]:
            return attend_seen(q, keys, values, step.seen)
        # One query alone with its key would be multiplied by another kernel, that rounds otherwise, than one of several.
        twice = attend_seen(torch.cat([q, q], 1), keys, values, torch.cat([step.seen, step.seen], 1))
        return twice[:, :1]

    def _attend_one(self, slot: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[tokens, heads, head_dim] of further tokens of one sequence."""
        end = start + len(q)
        for cache, new in ((self.k, k), (self.v, v)):
            cache[slot, :, start:end] = new.transpose(0, 1)
        keys, values = self._values(*(t[slot : slot + 1, :, :end] for t in (self.k, self.v)))
        if start == 0:
            return attend(q[None], keys.transpose(1, 2), values.transpose(1, 2))[0]
        parts = q.split(max(1, MASK // end))
        starts = accumulate((len(part) for part in parts), initial=start)
        return torch.cat([self._attend_part(part, keys, values, at) for part, at in zip(parts, starts, strict=False)])

    def _attend_part(self, q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        own = torch.arange(start, start + len(q), device=q.device)[:, None]
        seen = torch.arange(keys.shape[2], device=q.device) <= own
        return attend_seen(q[None], keys, values, seen[None])[0]

    def _codes(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Keys and values as they are kept."""
        if self.scales is None:
            return new
        scaled = (t.float() / scale for t, scale in zip(new, self.scales, strict=True))
        return tuple(e4m3.encode(t).view(torch.uint8) for t in scaled)

    def _values(self, *kept: Tensor) -> tuple[Tensor, ...]:
        if self.scales is None:
            return kept
        rows = (table.index_select(0, t.int().flatten()) for table, t in zip(self._tables, kept, strict=True))
        return tuple(values.view(t.shape) for values, t in zip(rows, kept, strict=True))

    def grow(self, more: int) -> None:
        """Makes room for so many more tokens of each slot."""
        self.k, self.v = (nn.functional.pad(t, (0, 0, 0, more)) for t in (self.k, self.v))

    def clear(self, slot: int, tokens: int) -> None:
        self.k[slot, :, :tokens], self.v[slot, :, :tokens] = 0, 0


class MambaSlots:
    """Convolution windows [slots, channels, width - 1] and SSM states [slots, heads, head_dim, state] of one Mamba-2 layer."""

    def __init__(self, pool: "Pool", mixer: Mamba2, number: int, dtype: torch.dtype, state_dtype: torch.dtype):
        self.pool, self.number = pool, number
        first = mixer.new_state(pool.slots, dtype)
        self.conv, self.ssm = first.conv, first.ssm.to(state_dtype)
        self._before: tuple[Tensor, Tensor] | None = None  # the slots' windows and states before a step that keeps them
        self._tokens: tuple[Tensor, Mamba2] | None = None  # and what came to them

    def mix(self, projected: Tensor, mixer: Mamba2) -> Tensor:
        step = self.pool.step
        if isinstance(step, Prefill):
            before = self.conv[step.indices], self.ssm[step.indices].float()
            y, self.conv[step.indices], after = mixer.scan(projected, *before, step.cu_seqlens)
            self.ssm[step.indices] = after.to(self.ssm.dtype)
            return y
        if step.keep:
            self._before = self.conv[step.indices], self.ssm[step.indices]
            self._tokens = projected, mixer
        return self._advance(projected, mixer, step.indices, step.noise)

    def _advance(self, projected: Tensor, mixer: Mamba2, indices: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            return mixer_step(projected, self.conv, self.ssm, *mixer.step_arguments(), indices=indices)
        # Each layer has a seed of its own; an odd multiplier keeps layers and seeds apart. Sums wrap around at 2^64.
        own = (self.number + 1) * 0x9E3779B97F4A7C15 % (1 << 64)
        seeds = (noise[:, :1] + (own - (own >> 63 << 64))) & ((1 << 63) - 1)
        # Each sequence by itself: its noise must not depend on its row in the batch.
        rows = zip(projected.split(1), indices.split(1), torch.cat((seeds, noise[:, 1:]), 1), strict=True)
        return torch.cat([self._advance_one(row, mixer, slot, draws) for row, slot, draws in rows])

    def _advance_one(self, projected: Tensor, mixer: Mamba2, slot: Tensor, noise: Tensor) -> Tensor:
        one = Decode(slot, slot[:, None], 0, padded=self.pool.step.padded)

        def convolve(xBC: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y, last = causal_conv1d(xBC, weight, bias, "silu", self.conv[one.slots], True)
            one.put(self.conv, (one.slots,), last)
            return y

        def update(*tokens: Tensor, chunk_size: int, **options) -> Tensor:
            return state_update(self.ssm, *tokens, **options, indices=slot, noise=noise)

        return mixer.mix(projected, convolve, update)

    def commit(self, step: Decode, tokens: list[int]) -> None:
        """Of each sequence's kept tokens the first tokens[i] stay: where others followed, the state before is moved anew."""
        (conv, ssm), (projected, mixer) = self._before, self._tokens
        for count in set(tokens) - {projected.shape[1]}:
            rows = [row for row, n in enumerate(tokens) if n == count]
            indices = step.indices[rows]
            self.conv[indices], self.ssm[indices] = conv[rows], ssm[rows]
            self._advance(projected[rows, :count], mixer, indices, None if step.noise is None else step.noise[rows])
        self._before = self._tokens = None

    def clear(self, slot: int, tokens: int) -> None:
        self.conv[slot], self.ssm[slot] = 0, 0


def cache_scales(blocks: nn.ModuleList, device: torch.device) -> list[tuple[Tensor, Tensor] | None]:
    """The fp32 scales of keys and of values in FP8, of each attention layer: those of its checkpoint, 1 where it has none."""

    def scale(projection: nn.Module, name: str) -> Tensor:
        given = getattr(projection, name, None)
        if given is None:
            return torch.ones((), dtype=torch.float32, device=device)
        return torch.where(given == 0, 1.0, given.detach().float()).reshape(())  # 0: of nothing but zeros

    return [
        (scale(block.mixer.k_proj, "k_scale"), scale(block.mixer.v_proj, "v_scale"))
        if isinstance(block.mixer, Attention)
        else None
        for block in blocks
    ]


class Pool:
    """`slots` sequences' states in each of `blocks`; lengths: how many tokens each has seen.

    dtype: of keys, values and windows. state_dtype: of the SSM states. scales: of keys and values kept in FP8, for each of the
    blocks, as cache_scales has them; None: they are kept in `dtype`.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        slots: int,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        device=None,
        scales: list[tuple[Tensor, Tensor] | None] | None = None,
    ):
        self.slots, self.device = slots, torch.device(device or "cpu")
        self.lengths = [0] * slots
        self.capacity = PAGE  # tokens of a slot that there is room for
        self.step: Prefill | Decode | None = None
        self._growing: list[tuple[int, int]] = []  # slot and tokens before, of the last step that keeps
        self.layers: list[AttentionSlots | MambaSlots | None] = []
        for number, block in enumerate(blocks):
            match block.mixer:
                case Mamba2():
                    self.layers.append(MambaSlots(self, block.mixer, number, dtype, state_dtype))
                case Attention():
                    own = None if scales is None else scales[number]
                    self.layers.append(AttentionSlots(self, block.mixer, dtype, own))
                case _:
                    self.layers.append(None)

    def begin(
        self,
        slots: list[int],
        counts: list[int],
        packed: bool = False,
        keep: bool = False,
        noise: list[tuple[int, int]] | None = None,
    ) -> list:
        """The state for a forward of counts[i] more tokens of slots[i]; the lengths are those after it.

        packed: the tokens come one sequence behind the other in one row (prefill); otherwise a row is a sequence, and all
        counts are the same. keep, noise: as of Decode, noise a (seed, offset) for each row.
        """
        starts = [self.lengths[slot] for slot in slots]
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        reach = whole_pages(max(ends, default=0))
        self.reserve(reach)
        if packed:
            self.step = Prefill(slots, starts, counts, self.device)
        else:
            positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(counts[0], device=self.device)
            indices, leading = torch.tensor(slots, device=self.device), slots == list(range(len(slots)))
            noise = None if noise is None else torch.tensor(noise, device=self.device)
            self.step = Decode(indices, positions, reach, leading, keep=keep, noise=noise)
            self._growing = list(zip(slots, starts, strict=True))
        for slot, end in zip(slots, ends, strict=True):
            self.lengths[slot] = end
        return self.layers

    def reserve(self, tokens: int) -> None:
        """Room for so many tokens of each slot; where there was less, keys and values move."""
        if tokens > self.capacity:
            more = max(tokens, 2 * self.capacity) - self.capacity
            for layer in self.layers:
                if isinstance(layer, AttentionSlots):
                    layer.grow(more)
            self.capacity += more

    def commit(self, tokens: list[int]) -> None:
        """After a step that keeps: of each of its sequences the first tokens[i] >= 1 stay, as if the others had never come."""
        for (slot, start), count in zip(self._growing, tokens, strict=True):
            self.lengths[slot] = start + count
        for layer in self.layers:
            if isinstance(layer, MambaSlots):
                layer.commit(self.step, tokens)

    def truncate(self, slot: int, tokens: int) -> None:
        """Forget all but a slot's first `tokens` tokens; for pools without Mamba-2 layers, whose states know no way back."""
        self.lengths[slot] = tokens

    def clear(self, slot: int) -> None:
        """The state before the first token."""
        for layer in self.layers:
            if layer is not None:
                layer.clear(slot, (self.lengths[slot] // PAGE + 2) * PAGE)  # drafts were written beyond the length
        self.lengths[slot] = 0
