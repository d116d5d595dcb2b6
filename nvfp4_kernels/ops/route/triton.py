"""route in three kernels, nothing read back by the host.

choose_kernel, a token a program: scores, choice, weights. A choice is the largest 64-bit key of those left, the value's bits
above, the index, inverted, below: so equal values go by index in one reduction, and the groups' limits by the same means.
count_kernel and place_kernel, SLOTS slots a program: how often each expert stands among them, and, once torch has summed these
counts by expert and then by program, the row of each slot: as a stable sort would place them.
"""

import torch
from torch import Tensor

from nvfp4_kernels.ops._triton import jit, launch, next_power_of_2, refuses_device, tl

SLOTS = 64  # of a program: a slot is compared with all that its program has before it
NONE = tl.constexpr(-(1 << 63))  # below every key


def refuses(logits: Tensor, bias: Tensor | None, *options) -> str | None:
    if logits.dtype == torch.float64 or bias is not None and bias.dtype == torch.float64:
        return "float64"
    return refuses_device(logits)


@jit
def keys(value, index):
    """Order by value, NaN above all, then by index, the lower first."""
    value = tl.where(value == 0, 0.0, value)  # of either sign
    b = value.to(tl.int32, bitcast=True)
    b = tl.where(value != value, 0x7FFFFFFF, b ^ ((b >> 31) & 0x7FFFFFFF))
    return (b.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@jit
def index_of(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@jit
def value_of(key):
    b = (key >> 32).to(tl.int32)
    return (b ^ ((b >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def best_groups(choice, expert, experts, groups, top_groups, BLOCK_G: tl.constexpr):
    """Whether an expert's group is among those with the best sums of their two best choices."""
    group, size = tl.arange(0, BLOCK_G), experts // groups
    sums = tl.full([BLOCK_G], NONE, tl.int64)
    for g in range(groups):
        mine = tl.where((expert // size == g) & (expert < experts), keys(choice, expert), NONE)
        first = tl.max(mine, 0)
        total = value_of(first)
        if size > 1:
            total += value_of(tl.max(tl.where(mine == first, NONE, mine), 0))
        sums = tl.where(group == g, keys(total, group), sums)
    allowed = expert < 0
    for _ in range(top_groups):
        best = tl.max(sums, 0)
        allowed = allowed | (expert // size == index_of(best))
        sums = tl.where(sums == best, NONE, sums)
    return allowed


@jit
def choose(
    logits_ptr, bias_ptr, token, experts, top_k, groups, top_groups,
    BIASED: tl.constexpr, GROUPED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """For each expert its score and its rank among the chosen, -1 if it is not."""
    expert = tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + token * experts + expert, expert < experts, 0.0).to(tl.float32)
    score = tl.sigmoid(logits)
    choice = score
    if BIASED:
        choice += tl.load(bias_ptr + expert, expert < experts, 0.0).to(tl.float32)
    if GROUPED:
        allowed = best_groups(choice, expert, experts, groups, top_groups, BLOCK_G)
        choice = tl.where(allowed, choice, float("-inf"))
    left = tl.where(expert < experts, keys(choice, expert), NONE)
    rank = tl.full([BLOCK], -1, tl.int32)
    for c in range(top_k):
        best = tl.max(left, 0)
        rank = tl.where(left == best, c, rank)
        left = tl.where(left == best, NONE, left)
    return score, rank


@jit
def divisor(score, rank, NORMALIZE: tl.constexpr):
    return tl.sum(tl.where(rank >= 0, score, 0.0), 0) + 1e-20 if NORMALIZE else 1.0


@jit
def choose_kernel(
    logits_ptr, bias_ptr, indices_ptr, weights_ptr, experts, top_k, scale, groups, top_groups,
    BIASED: tl.constexpr, GROUPED: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    score, rank = choose(
        logits_ptr, bias_ptr, token, experts, top_k, groups, top_groups, BIASED, GROUPED, BLOCK, BLOCK_G
    )
    slot = token * top_k + rank
    tl.store(indices_ptr + slot, tl.arange(0, BLOCK).to(tl.int64), rank >= 0)
    tl.store(weights_ptr + slot, score / divisor(score, rank, NORMALIZE) * tl.cast(scale, tl.float32), rank >= 0)


@jit
def backward_kernel(
    dweights_ptr, logits_ptr, bias_ptr, dlogits_ptr, experts, top_k, scale, groups, top_groups,
    BIASED: tl.constexpr, GROUPED: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """With w = scale s / S, S the sum: ds = scale (dw - <dw, s> / S) / S; dlogit = ds s (1 - s)."""
    token, expert = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    score, rank = choose(
        logits_ptr, bias_ptr, token, experts, top_k, groups, top_groups, BIASED, GROUPED, BLOCK, BLOCK_G
    )
    dweight = tl.load(dweights_ptr + token * top_k + rank, rank >= 0, 0.0)
    total = divisor(score, rank, NORMALIZE)
    if NORMALIZE:
        dweight -= tl.sum(tl.where(rank >= 0, dweight * (score / total), 0.0), 0)
    dscore = dweight / total * tl.cast(scale, tl.float32)
    dlogit = tl.where(rank >= 0, dscore * score * (1.0 - score), 0.0)
    tl.store(dlogits_ptr + token * experts + expert, dlogit, expert < experts)


@jit(do_not_specialize=["slots"])
def count_kernel(indices_ptr, counts_ptr, slots, experts, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """counts[expert, program]."""
    slot, expert = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS), tl.arange(0, BLOCK)
    chosen = tl.load(indices_ptr + slot, slot < slots, -1).to(tl.int32)
    count = tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), 0).to(tl.int64)
    at = expert.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts_ptr + at, count, expert < experts)


@jit(do_not_specialize=["slots"])
def place_kernel(indices_ptr, ends_ptr, counts_ptr, inverse_ptr, order_ptr, slots, SLOTS: tl.constexpr):
    """ends[expert, program]: the counts summed up to and with this one."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    inside = slot < slots
    chosen = tl.load(indices_ptr + slot, inside, -1)
    earlier = (chosen[:, None] == chosen[None, :]) & (slot[:, None] > slot[None, :])
    at = chosen * tl.num_programs(0) + tl.program_id(0)
    first = tl.load(ends_ptr + at, inside, 0) - tl.load(counts_ptr + at, inside, 0)
    row = first + tl.sum(earlier.to(tl.int32), 1)
    tl.store(inverse_ptr + slot, row, inside)
    tl.store(order_ptr + row, slot.to(tl.int64), inside)


def run(
    logits: Tensor, bias: Tensor | None, top_k: int, scale: float, n_group: int, topk_group: int, normalize: bool
) -> tuple[Tensor, ...]:
    (tokens, experts), integers = logits.shape, dict(dtype=torch.int64, device=logits.device)
    slots = tokens * top_k
    indices, inverse = torch.empty(tokens, top_k, **integers), torch.empty(tokens, top_k, **integers)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    logits, bias, form = _inputs(logits, bias, n_group)
    sizes = experts, top_k, scale, n_group, topk_group
    launch(choose_kernel, (tokens,), logits, bias, indices, weights, *sizes, NORMALIZE=normalize, **form)

    programs = -(-slots // SLOTS)
    counts, order = torch.empty(experts, programs, **integers), torch.empty(slots, **integers)
    launch(count_kernel, (programs,), indices, counts, slots, experts, SLOTS=SLOTS, BLOCK=form["BLOCK"], num_warps=8)
    ends = counts.flatten().cumsum(0)
    launch(place_kernel, (programs,), indices, ends, counts, inverse, order, slots, SLOTS=SLOTS)
    offsets = torch.zeros(experts + 1, **integers)
    if programs:
        offsets[1:] = ends.view(experts, programs)[:, -1]
    return indices, weights, offsets, inverse, order


def backward(
    dweights: Tensor, logits: Tensor, bias: Tensor | None, top_k: int, scale: float, n_group: int, topk_group: int,
    normalize: bool,
) -> Tensor:  # fmt: skip
    """The gradient of the logits; the choice is made again."""
    dlogits = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    wide, bias, form = _inputs(logits, bias, n_group)
    sizes = logits.shape[1], top_k, scale, n_group, topk_group
    tensors = dweights.contiguous(), wide, bias, dlogits
    launch(backward_kernel, (logits.shape[0],), *tensors, *sizes, NORMALIZE=normalize, **form)
    return dlogits.to(logits.dtype)


def _inputs(logits: Tensor, bias: Tensor | None, groups: int) -> tuple[Tensor, Tensor, dict]:
    block = next_power_of_2(logits.shape[1])
    form = dict(BIASED=bias is not None, GROUPED=groups > 1, BLOCK=block, BLOCK_G=next_power_of_2(groups))
    logits = logits.contiguous()
    return logits, logits if bias is None else bias.contiguous(), form | dict(num_warps=max(1, min(4, block // 128)))
