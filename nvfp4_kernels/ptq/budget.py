"""Formats under a budget of bits: what each group of layers costs the model in each format, and the cheapest choice.

The cost of a format is measured: the group alone is quantized, its inputs as well as its weights, and the model's
predictions on a text are compared with its own before, by their Kullback-Leibler divergence in nats a token. By that much
the loss rises on the average over texts that the model itself would write. It is never negative and takes in every token's
whole distribution, so that a few thousand tokens tell formats apart whose losses on them differ by chance alone. The costs
of groups are taken to add up.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nvfp4_kernels.nn.quantized import QuantizedExperts
from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ptq.activations import quantized_activations
from nvfp4_kernels.ptq.apply import quantize_target, swap
from nvfp4_kernels.ptq.calibrate import Amaxes
from nvfp4_kernels.ptq.evaluate import LOGITS, TOKENS, token_nats, windows
from nvfp4_kernels.ptq.formats import BITS, Target

CHOICES = ("nvfp4", "fp8", "bf16")  # from few bits to many
STEPS = 1 << 14  # of the budget that the choice tells apart, at most


@dataclass(frozen=True)
class Group:
    """Targets that share one format, since they are run as one: a layer's experts, and q, k and v of attention."""

    name: str
    targets: tuple[Target, ...]

    @property
    def weights(self) -> int:
        return sum(target.weights for target in self.targets)

    @property
    def choices(self) -> tuple[str, ...]:
        """NVFP4 only for rows of whole blocks."""
        whole = all(target.shape[1] % 16 == 0 for target in self.targets)
        return CHOICES if whole else CHOICES[1:]


@dataclass(frozen=True)
class Cost:
    """divergence, loss: nats a token, of the whole model with this one group in `format`; loss is the rise over its own."""

    group: Group
    format: str
    divergence: float
    loss: float


def groups(found: Iterable[Target]) -> list[Group]:
    """The layers of the backbone. Head, embeddings and the multi-token-prediction block stay as they are."""
    members: dict[str, list[Target]] = {}
    for target in found:
        if not target.name.startswith("backbone.layers."):
            continue
        owner, _, part = target.name.rpartition(".")
        together = target.experts is not None or part in ("q_proj", "k_proj", "v_proj")
        name = owner if target.experts else f"{owner}.qkv_proj" if together else target.name
        members.setdefault(name, []).append(target)
    return [Group(name, tuple(targets)) for name, targets in members.items()]


@torch.no_grad()
def measure(
    model: nn.Module,
    found: Sequence[Group],
    ids: np.ndarray,
    length: int,
    amaxes: Amaxes | None,
    search: str = "max",
    four_over_six: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Cost]:
    """The cost of each group in each format of its choices, on the first few thousand of `ids`; of bf16 it is 0.

    A trial runs the layers from the group's own on: what the layers before it give is kept. progress: called with trials
    done and all. amaxes: of calibrate, for the input scales; None leaves the inputs as they are. The model is left as it was.
    """
    vocab, device = model.config.vocab_size, next(model.parameters()).device
    tokens = min(len(ids) - 1, TOKENS, LOGITS // vocab)
    batches = [
        (rows.to(device), labels.to(device)) for rows, labels in windows(ids[: tokens + 1], min(length, tokens), vocab)
    ]
    training = model.training
    model.eval()
    try:
        passes = [_Pass(model, *batch) for batch in batches]
        costs, done = [], 0
        total = sum(len(group.choices) - 1 for group in found)
        for group in found:
            for form in group.choices[:-1]:
                costs.append(Cost(group, form, *_trial(model, group, form, passes, amaxes, search, four_over_six)))
                done += 1
                progress(done, total)
            costs.append(Cost(group, "bf16", 0.0, 0.0))
    finally:
        model.train(training)
    return costs


class _Pass:
    """One batch through the model as it is: what each layer was given, and what came out."""

    def __init__(self, model: nn.Module, ids: Tensor, labels: Tensor):
        self.labels, self.inputs = labels, []
        layers = model.backbone.layers
        keep = [layer.register_forward_pre_hook(lambda module, args: self.inputs.append(args[0])) for layer in layers]
        try:
            self.logits = model(ids)
        finally:
            for handle in keep:
                handle.remove()
        self.nats = token_nats(self.logits, labels)

    def again(self, model: nn.Module, first: int) -> tuple[float, float]:
        """Sums of divergence and of the rise in loss when layers from `first` on are run anew."""
        x = self.inputs[first]
        for layer in model.backbone.layers[first:]:
            x, _ = layer(x)
        logits = model.lm_head(model.backbone.norm_f(x))
        divergence = sum(
            nn.functional.kl_div(
                new.float().log_softmax(-1), old.float().log_softmax(-1), reduction="sum", log_target=True
            ).item()
            for new, old in zip(logits, self.logits, strict=True)
        )
        return divergence, float((token_nats(logits, self.labels) - self.nats).sum(dtype=torch.float64))


def _trial(model, group: Group, form: str, passes: list[_Pass], amaxes, search, four_over_six) -> tuple[float, float]:
    made = [quantize_target(model, target, form, amaxes, search, four_over_six)[0] for target in group.targets]
    if group.targets[0].experts:
        new = {group.name: QuantizedExperts(*made)}
    else:
        new = {target.name: layer for target, layer in zip(group.targets, made, strict=True)}
    before = {name: swap(model, name, layer) for name, layer in new.items()}
    try:
        with quantized_activations(model):
            sums = [one.again(model, int(group.name.split(".")[2])) for one in passes]
    finally:
        for name, layer in before.items():
            swap(model, name, layer)
    tokens = sum(one.labels.numel() for one in passes)
    return max(sum(s[0] for s in sums), 0.0) / tokens, sum(s[1] for s in sums) / tokens


def choose(costs: Iterable[Cost], bits: float) -> dict[str, str]:
    """The format of each target of the measured groups, with the least sum of divergences within `bits` a weight on average.

    A knapsack in which each group takes one format, solved exactly over STEPS steps of the budget; sizes are rounded up to
    steps, so that the budget holds. Raises ValueError for a budget below what the smallest formats need.
    """
    options: dict[Group, list[Cost]] = {}
    for cost in costs:
        options.setdefault(cost.group, []).append(cost)
    # In half bits, for 4.5 is no whole number; over what each group takes at least.
    size = {(g, c.format): round(2 * BITS[c.format]) * g.weights for g, own in options.items() for c in own}
    least = {g: min(size[g, c.format] for c in own) for g, own in options.items()}
    weights = sum(g.weights for g in options)
    spare = math.floor(2 * bits * weights + 1e-6) - sum(least.values())
    require(
        spare >= 0, "bits", bits, f"at least {sum(least.values()) / (2 * weights):.2f}, what the smallest formats need"
    )
    extra = {key: value - least[key[0]] for key, value in size.items()}
    unit = max(math.gcd(*extra.values()), math.ceil(spare / STEPS), 1)
    steps = min(spare, sum(max(extra[g, c.format] for c in own) for g, own in options.items())) // unit
    best, taken = np.zeros(steps + 1), []
    for group, own in options.items():
        table = np.full((len(own), steps + 1), np.inf)
        for row, cost in zip(table, own, strict=True):
            width = math.ceil(extra[group, cost.format] / unit)
            if width <= steps:
                row[width:] = best[: steps + 1 - width] + cost.divergence
        taken.append(table.argmin(0))
        best = table.min(0)
    picked, at = {}, steps
    for group, row in zip(reversed(options), reversed(taken), strict=True):
        picked[group] = options[group][row[at]]
        at -= math.ceil(extra[group, picked[group].format] / unit)
    spare -= sum(extra[group, cost.format] for group, cost in picked.items())
    _spend(picked, options, extra, spare)
    return {target.name: cost.format for group, cost in picked.items() for target in group.targets}


def _spend(picked: dict[Group, Cost], options: dict[Group, list[Cost]], extra: dict, spare: int) -> None:
    """What the rounding to steps has left over, on the changes that gain most for their size."""
    while True:
        best = None
        for group, own in options.items():
            for cost in own:
                more = extra[group, cost.format] - extra[group, picked[group].format]
                gain = picked[group].divergence - cost.divergence
                if gain > 0 and more <= spare and (best is None or gain / max(more, 1) > best[0]):
                    best = gain / max(more, 1), more, group, cost
        if best is None:
            return
        _, more, group, cost = best
        picked[group] = cost
        spare -= more


def complete(found: Iterable[Target], chosen: Mapping[str, str]) -> dict[str, str]:
    """`chosen` for all targets, those outside the groups in bf16."""
    return {target.name: chosen.get(target.name, "bf16") for target in found}
