"""route: which experts serve each token, with what weight, and where their rows lie once sorted by expert."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import float_operand, floating_point, integer, number, require
from nvfp4_kernels.ops._dispatch import select
from nvfp4_kernels.ops._library import register_differentiable, unobserved


@dataclass(frozen=True)
class Routing:
    """The slots (token, choice) of a batch of tokens, and their order once sorted by expert, tokens in order within one.

    indices: int64 [tokens, top_k], the experts of each token. weights: float [tokens, top_k], theirs, differentiable in the
    logits.
    offsets: int64 [experts + 1]; expert e has the sorted rows offsets[e] to offsets[e + 1].
    inverse: int64 [tokens, top_k], the sorted row of each slot.
    order: int64 [tokens * top_k], the slot (token * top_k + choice) of each sorted row.
    """

    indices: Tensor
    weights: Tensor
    offsets: Tensor
    inverse: Tensor
    order: Tensor

    def sizes(self) -> list[int]:
        """Rows of each expert, on the host."""
        return self.offsets.diff().tolist()


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scale: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    normalize: bool = True,
) -> Routing:
    """Choose `top_k` experts for each token by sigmoid(logits) + bias; weigh them by sigmoid(logits) alone.

    logits: float [tokens, experts]; the scores are fp32 (fp64 for fp64 logits).
    bias: float [experts] or None; it sways the choice, never the weights, and gets no gradient.
    n_group, topk_group: with n_group > 1 only the topk_group groups with the best sum of their two best scores may be
        chosen from. normalize: divide the weights by their sum. scale: multiply them by this.
    Equal scores are chosen by index, the lower first; NaN counts as the largest, so that it shows in the weights.
    Returns a Routing. Raises TypeError or ValueError naming the argument.
    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; as Nemotron 3 uses it.
    """
    floating_point("logits", logits)
    if logits.dim() != 2:  # no words are put together for what is right
        require(False, "logits", f"shape {list(logits.shape)}", "[tokens, experts]")
    experts = logits.shape[1]
    check_choice(experts, top_k, n_group, topk_group)
    number("scale", scale)
    float_operand("bias", bias, (experts,), logits.device, optional=True)
    run = _run if unobserved(logits) else torch.ops.nvfp4.route
    return Routing(*run(logits, bias, top_k, float(scale), n_group, topk_group, normalize))


def check_choice(experts: int, top_k: int, n_group: int, topk_group: int) -> None:
    for name, value in (("top_k", top_k), ("n_group", n_group), ("topk_group", topk_group)):
        integer(name, value)
    require(1 <= top_k <= experts, "top_k", top_k, f"1 to {experts}, the number of experts")
    require(
        n_group >= 1 and experts % n_group == 0, "n_group", n_group, f"a divisor of {experts}, the number of experts"
    )
    require(1 <= topk_group <= n_group, "topk_group", topk_group, f"1 to n_group ({n_group})")
    require(
        top_k <= experts // n_group * topk_group,
        "topk_group",
        topk_group,
        f"groups with at least top_k ({top_k}) experts together",
    )


def check_routing(routing: object) -> None:
    """`routing` must be a Routing whose parts fit one another in memory; what is in them the CPU's kernels check."""
    require(isinstance(routing, Routing), "routing", type(routing).__name__, "a Routing, as nk.route gives", TypeError)
    (tokens, top_k), inverse, order = routing.indices.shape, routing.inverse, routing.order
    fits = inverse.shape == routing.weights.shape == (tokens, top_k) and order.shape == (tokens * top_k,)
    for part in (routing.offsets, inverse, order):
        fits = fits and part.dtype == torch.int64 and part.is_contiguous() and part.device == order.device
    require(fits, "routing", "parts of other shapes, types, strides or devices", "a Routing as nk.route makes it")


def _run(*arguments) -> tuple[Tensor, ...]:
    return select("route", *arguments).run(*arguments)


def _backward(dindices, dweights: Tensor, doffsets, dinverse, dorder, *arguments) -> tuple[Tensor]:
    return (select("route", *arguments).backward(dweights, *arguments),)


def _fake(logits: Tensor, bias, top_k: int, *options) -> tuple[Tensor, ...]:
    tokens, experts = logits.shape
    integers = [
        logits.new_empty(n, dtype=torch.int64) for n in ((tokens, top_k), experts + 1, (tokens, top_k), tokens * top_k)
    ]
    weights = logits.new_empty(tokens, top_k, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return integers[0], weights, *integers[1:]


register_differentiable(
    "route",
    "Tensor logits, Tensor? bias, int top_k, float scale, int n_group, int topk_group, bool normalize",
    5,
    _run,
    _fake,
    _backward,
    1,
)
