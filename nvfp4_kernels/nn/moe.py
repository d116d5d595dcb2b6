"""Mixture of experts, with or without a latent space, and the dense MLP: matrices with a squared ReLU between them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nvfp4_kernels.autograd.experts import experts, quantize_experts
from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.nn import served
from nvfp4_kernels.nn.aside import aside
from nvfp4_kernels.nn.forms import Derived, Deriving, FormsCache
from nvfp4_kernels.nn.linear import Linear, new_noise
from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ops.expert_mlp.op import expert_mlp
from nvfp4_kernels.ops.permute.op import unpermute
from nvfp4_kernels.ops.relu2.op import relu2
from nvfp4_kernels.ops.route.op import Routing, route
from nvfp4_kernels.ops.router_logits.op import router_logits
from nvfp4_kernels.recipe import HIGH, LinearRecipe


class Balance(NamedTuple):
    """What a layer reports on its load: the auxiliary loss (unscaled), and how many slots each expert got."""

    loss: Tensor
    load: Tensor


class MLP(nn.Module):
    """down_proj(relu(up_proj(x))^2)."""

    def __init__(self, hidden: int, width: int, bias: bool = False):
        super().__init__()
        self.up_proj = Linear(hidden, width, bias)
        self.down_proj = Linear(width, hidden, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(relu2(self.up_proj(x)))


class Router(nn.Module):
    """Scores in fp32 from the full-width input. The bias sways the choice alone; `balance` moves it against the load."""

    def __init__(
        self, hidden: int, num_experts: int, top_k: int, scale: float, n_group: int, topk_group: int, normalize: bool
    ):
        super().__init__()
        self.options = (top_k, scale, n_group, topk_group, normalize)
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden, dtype=torch.float32))
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts, dtype=torch.float32))
        # slots since the last balance()
        self.register_buffer("load", torch.zeros(num_experts, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> tuple[Routing, Tensor]:
        """x: [tokens, hidden]. Returns the routing and the logits [tokens, experts]."""
        logits = router_logits(x, self.weight)
        return route(logits, self.e_score_correction_bias, *self.options), logits

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """bias += rate * sign(mean load - load), and forget the load. Source: arXiv 2408.15664."""
        load = self.load.double()
        self.e_score_correction_bias += rate * torch.sign(load.mean() - load)
        self.load.zero_()

    def _apply(self, fn, recurse=True):
        # no cast reaches integers: in bf16 most steps of the bias would round to none
        self.e_score_correction_bias = self.e_score_correction_bias.view(torch.int32)
        try:
            return super()._apply(fn, recurse)
        finally:
            self.e_score_correction_bias = self.e_score_correction_bias.view(torch.float32)


class Experts(Deriving):
    """The stacked matrices of all experts, each expert quantized by itself; `recipes` of the two may be replaced any time."""

    def __init__(self, num_experts: int, size: int, width: int):
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(num_experts, width, size, dtype=torch.float32))
        self.down_proj = nn.Parameter(torch.empty(num_experts, size, width, dtype=torch.float32))
        self.register_buffer("up_noise", new_noise(self.up_proj.device))
        self.register_buffer("down_noise", new_noise(self.up_proj.device))
        self.recipes: dict[str, LinearRecipe] = {"up_proj": HIGH, "down_proj": HIGH}
        self._up_forms, self._down_forms = FormsCache(quantize_experts), FormsCache(quantize_experts)

    def forward(self, x: Tensor, groups: Routing | Tensor, weights: Tensor | None = None) -> Tensor:
        """x, groups: tokens [tokens, size] and their Routing, or rows sorted by expert and the offsets of each expert's, int64
        [experts + 1]. weights: [rows], put before down_proj, or None. Returns [rows, size], sorted by expert."""
        recipes = self.recipes["up_proj"], self.recipes["down_proj"]
        forms = (
            self._up_forms.get(self.up_proj, recipes[0], self.up_noise),
            self._down_forms.get(self.down_proj, recipes[1], self.down_noise),
        )
        noises = self.up_noise, self.down_noise
        return experts(x, self.up_proj, self.down_proj, groups, weights, recipes, noises, forms)

    def stacks(self) -> tuple[Stack, Stack] | None:
        """Both matrices as nk.expert_mlp takes them, or None where a recipe quantizes the activations too."""
        if any(recipe.quantized for recipe in self.recipes.values()) or self.up_proj.dtype == torch.float64:
            return None
        return Stack(self.up_proj), Stack(self.down_proj)

    def refresh(self) -> None:
        """Forget the quantized weights; needed only after writing through `.data` by hand."""
        self._up_forms.clear()
        self._down_forms.clear()


class MoE(nn.Module):
    """shared_experts(x) + fc2(sum_e w_e expert_e(fc1(x))), fc1 and fc2 only where there is a latent width.

    Router and shared experts read the full width; on a GPU the shared experts run beside the others, on a second stream. At
    inference on a CPU up to 64 tokens go through the block in one call, that of moe_step.
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int,
        width: int,
        shared_width: int | None,
        latent: int | None = None,
        scale: float = 1.0,
        n_group: int = 1,
        topk_group: int = 1,
        normalize: bool = True,
        bias: bool = False,
    ):
        super().__init__()
        self.gate = Router(hidden, num_experts, top_k, scale, n_group, topk_group, normalize)
        self.experts = Experts(num_experts, latent or hidden, width)
        self.shared_experts = MLP(hidden, shared_width, bias) if shared_width else None
        self.fc1_latent_proj = Linear(hidden, latent, bias) if latent else None
        self.fc2_latent_proj = Linear(latent, hidden, bias) if latent else None
        self._operands = Derived(served.operands)

    def forward(self, x: Tensor) -> tuple[Tensor, Balance | None]:
        """x: [batch, length, hidden]. Training puts the routing weights before down_proj, as Megatron-LM; otherwise after.

        The balance is for training; otherwise it is None.
        """
        hidden = self.gate.weight.shape[1]
        if x.dim() != 3 or x.shape[2] != hidden:
            require(False, "x", f"shape {list(x.shape)}", f"[batch, length, {hidden}]")
        tokens = x.flatten(0, 1)
        if not self.training and (y := self._in_one_call(tokens)) is not None:
            return y.view_as(x), None
        shared = None if self.shared_experts is None else aside(self.shared_experts, tokens)
        routing, logits = self.gate(tokens)
        inner = tokens if self.fc1_latent_proj is None else self.fc1_latent_proj(tokens)
        y = self._trained(inner, routing) if self.training else self._served(inner, routing)
        y = y if self.fc2_latent_proj is None else self.fc2_latent_proj(y)
        y = (y if shared is None else y + shared()).view_as(x)
        if not self.training:
            return y, None
        loss = sequence_balance_loss(torch.sigmoid(logits), routing.indices, x.shape[0])
        return y, Balance(loss, routing.offsets.diff())

    def _in_one_call(self, tokens: Tensor) -> Tensor | None:
        known = type(self.gate) is Router and type(self.shared_experts) in (MLP, type(None))
        if not known or not served.in_one_call(tokens) or (parts := served.parts(self, tokens.dtype)) is None:
            return None
        operands = self._operands.get(*parts)
        return None if operands is None else served.call(tokens, operands, self.gate.options)

    def _trained(self, x: Tensor, routing: Routing) -> Tensor:
        weights = routing.weights.flatten().index_select(0, routing.order)
        return unpermute(self.experts(x, routing, weights), routing)

    def _served(self, x: Tensor, routing: Routing) -> Tensor:
        stacks = self.experts.stacks()
        if stacks is None or torch.is_grad_enabled():
            return unpermute(self.experts(x, routing), routing, routing.weights)
        return expert_mlp(x, routing, *stacks)


def sequence_balance_loss(scores: Tensor, indices: Tensor, batch: int) -> Tensor:
    """Mean over sequences of sum_e f_e P_e: f_e the share of slots times the number of experts, P_e the mean normalised score.

    1 when balanced, more when not; 0 without tokens. Source: DeepSeek-V3 (arXiv 2412.19437), equations 17 to 20.
    """
    experts_, top_k = scores.shape[1], indices.shape[1]
    if scores.shape[0] == 0:
        return scores.sum()
    share = (scores / (scores.sum(1, keepdim=True) + 1e-20)).view(batch, -1, experts_).mean(1)
    picked = torch.zeros_like(share).scatter_add_(
        1, indices.view(batch, -1), torch.ones_like(scores[:1, :1]).expand(batch, indices.numel() // batch)
    )
    return (picked * (experts_ / (top_k * (scores.shape[0] // batch))) * share).sum(1).mean()
