"""HybridModel: embeddings, a pattern of Mamba-2, attention, expert and MLP layers, a head, and multi-token prediction."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.model.init import initialize
from nvfp4_kernels.nn.attention import Attention, AttentionState
from nvfp4_kernels.nn.block import Block
from nvfp4_kernels.nn.linear import Linear
from nvfp4_kernels.nn.mamba2 import Mamba2, Mamba2State
from nvfp4_kernels.nn.moe import MLP, Balance, Experts, MoE, Router
from nvfp4_kernels.nn.mtp import MTP, ahead
from nvfp4_kernels.nn.norm import RMSNorm
from nvfp4_kernels.ops._check import integers, require
from nvfp4_kernels.recipe import LinearRecipe, Recipe, get_recipe

State = list[AttentionState | Mamba2State | None]


class Losses(NamedTuple):
    """total = lm + mtp + balance: what to call backward on, and its parts, each with its factor."""

    total: Tensor
    lm: Tensor
    mtp: Tensor
    balance: Tensor


def _embedding(rows: int, width: int) -> nn.Embedding:
    """An nn.Embedding, fp32. On the meta device nothing is drawn: normal_ there imports torch's compiler, which takes as long
    as importing torch."""
    weight = torch.empty(rows, width, dtype=torch.float32)
    return nn.Embedding(rows, width, _weight=weight if weight.is_meta else weight.normal_())


class Backbone(nn.Module):
    """Embeddings, layers and last norm, under the names of the published checkpoints."""

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.embeddings = _embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(block(config, letter) for letter in config.hybrid_override_pattern)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)


class HybridModel(nn.Module):
    """The model of `config`, with freshly drawn fp32 parameters; activations have config.dtype.

    recipe: a Recipe or its name ("bf16", "nvfp4", "nemotron3"); `set_recipe` changes it later.
    checkpoint_activations: keep each layer's input alone and run the layer again in backward.
    """

    def __init__(self, config: HybridConfig, recipe: "Recipe | LinearRecipe | str" = "bf16"):
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.source: Path | None = None  # the folder of its tokenizer, which a save takes along
        self.kv_cache_algorithm: str | None = None  # "FP8" where the checkpoint says so
        self.backbone = Backbone(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.mtp = None
        if config.num_nextn_predict_layers:
            blocks = [block(config, letter) for letter in config.mtp_hybrid_override_pattern]
            self.mtp = MTP(config.hidden_size, blocks, config.layer_norm_epsilon)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight
        self._routers = {name: module for name, module in self.named_modules() if isinstance(module, Router)}
        initialize(self, config)
        self.set_recipe(recipe)

    def forward(self, ids: Tensor, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        """Logits [batch, length, vocab] in config.dtype for ids, int64 [batch, length].

        cu_seqlens: int [documents + 1], ascending from 0 to batch * length with every row boundary among them: where documents
        start in the batch * length tokens taken row after row. No document sees another. None: each row is one.
        state: from new_state, for decoding: ids follow the tokens that it has seen, and are added to it.
        Raises TypeError or ValueError naming the argument.
        """
        return self.lm_head(self.hidden(ids, cu_seqlens, state))

    def hidden(self, ids: Tensor, cu_seqlens: Tensor | None = None, state: State | None = None) -> Tensor:
        """What lm_head and the MTP block read, [batch, length, hidden_size]; arguments as forward's."""
        if state is not None and cu_seqlens is not None:
            raise ValueError(
                "state: got both cu_seqlens and a state; allowed: one of them, rows being documents with a state"
            )
        hidden, balances = self._hidden(ids, _boundaries(ids, cu_seqlens), state)
        self._count(balances)
        return hidden

    def embed(self, ids: Tensor) -> Tensor:
        """The embeddings of ids, [..., hidden_size] in config.dtype."""
        return self.backbone.embeddings(ids).to(self.config.dtype)

    def new_state(self, batch: int) -> State:
        """What each layer keeps of the tokens of `batch` rows while decoding: forward(ids, state=state) continues them."""
        state = []
        for layer in self.backbone.layers:
            match layer.mixer:
                case Mamba2():
                    state.append(layer.mixer.new_state(batch, self.config.dtype))
                case Attention():
                    state.append(AttentionState())
                case _:
                    state.append(None)
        return state

    def loss(self, ids: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None) -> Losses:
        """The training losses. labels: int64 [batch, length], the token that follows each of ids; -100 is left out.

        lm: mean cross-entropy, nats a token. mtp: mtp_loss_scaling_factor times the mean of it over the depths. balance:
        router_aux_loss_coef times the sequence-wise auxiliary loss, summed over the layers.
        """
        cu_seqlens = _boundaries(ids, cu_seqlens)
        require(isinstance(labels, Tensor), "labels", type(labels).__name__, "an int64 tensor", TypeError)
        require(labels.dtype == torch.int64, "labels", labels.dtype, "int64", TypeError)
        if labels.shape != ids.shape:
            raise ValueError(f"labels: got shape {list(labels.shape)}; allowed: {list(ids.shape)}, as ids")
        hidden, balances = self._hidden(ids, cu_seqlens)
        lm = self._cross_entropy(hidden, labels)
        mtp, more = self._mtp_loss(hidden, ids, labels, cu_seqlens)
        balances += more
        self._count(balances)
        zero = lm.new_zeros(())
        balance = sum((b.loss for b in balances), zero) * self.config.router_aux_loss_coef
        return Losses(lm + mtp + balance, lm.detach(), mtp.detach(), balance.detach())

    def set_recipe(self, recipe: "Recipe | LinearRecipe | str") -> None:
        """Give each linear layer and each stack of experts what `recipe` says for its name and depth."""
        self.recipe = get_recipe(recipe)
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                module.recipe = self.recipe.for_module(name, self._depth(name))
            elif isinstance(module, Experts):
                module.recipes = {
                    part: self.recipe.for_module(f"{name}.{part}", self._depth(name))
                    for part in ("up_proj", "down_proj")
                }

    def train_only(self, patterns: Iterable[str]) -> None:
        """Freeze every parameter whose name matches none of these fnmatch patterns ("backbone.layers.*.q_proj.*").

        Quantized matrices are no parameters: they are frozen always. A frozen router's bias does not move either.
        Raises ValueError for a pattern that matches no parameter.
        """
        names = [name for name, _ in self.named_parameters()]
        for pattern in (patterns := list(patterns)):
            if not any(fnmatchcase(name, pattern) for name in names):
                shown = ", ".join(names[:5])
                raise ValueError(
                    f"train_only: got {pattern!r}, which matches no parameter; allowed: patterns over {shown}, ..."
                )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in patterns))

    def routers(self) -> dict[str, Router]:
        """The routers by name."""
        return dict(self._routers)

    def update_router_bias(self) -> None:
        """Move each router's bias against the load since the last call; to be called after an optimizer step.

        Of several processes each knows its own load alone: sum the routers' `load` over them first.
        """
        for router in self.routers().values():
            router.balance(self.config.router_bias_update_rate if router.weight.requires_grad else 0.0)

    def expert_load(self) -> dict[str, float]:
        """Of the slots routed since the last update_router_bias: the worst router's max / mean - 1 ("max_violation"); the mean
        of it over the routers ("mean_violation"), and of the loads' entropy in nats ("entropy", log(experts) where even); and
        the share of experts that got nothing ("idle"). Empty before any slot."""
        loads = [router.load for router in self.routers().values()]
        loads = torch.stack(loads).cpu().double() if loads else torch.zeros(0, 1)  # one wait for the device
        loads = loads[loads.sum(1) > 0]
        if not len(loads):
            return {}
        violations = loads.amax(1) / loads.mean(1) - 1
        shares = loads / loads.sum(1, keepdim=True)
        return {
            "max_violation": float(violations.max()),
            "mean_violation": float(violations.mean()),
            "entropy": float(torch.special.entr(shares).sum(1).mean()),
            "idle": float((loads == 0).float().mean()),
        }

    def _hidden(
        self, ids: Tensor, cu_seqlens: Tensor | None, state: State | None = None
    ) -> tuple[Tensor, list[Balance]]:
        x, balances = self.embed(ids), []
        for layer, past in zip(self.backbone.layers, state or [None] * len(self.backbone.layers), strict=True):
            x, balance = self._run(layer, x, cu_seqlens, past)
            balances += [balance] if balance else []
        return self.backbone.norm_f(x), balances

    def _run(self, layer: nn.Module, *arguments):
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
        return layer(*arguments)

    def _mtp_loss(
        self, hidden: Tensor, ids: Tensor, labels: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, list[Balance]]:
        """At depth d position t reads token t + d and predicts label t + d, all depths through the same weights."""
        total, balances = hidden.new_zeros((), dtype=torch.float32), []
        if self.mtp is None:
            return total, balances
        depths = self.config.mtp_num_depths
        for depth in range(1, depths + 1):
            embedding = self.embed(ahead(ids, depth, 0, cu_seqlens))
            hidden, more = self._run(self.mtp, hidden, embedding, cu_seqlens)
            total = total + self._cross_entropy(hidden, ahead(labels, depth, -100, cu_seqlens))
            balances += more
        return total * (self.config.mtp_loss_scaling_factor / depths), balances

    def _cross_entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean over the labels that count; 0 where none does."""
        logits = self.lm_head(hidden).flatten(0, 1)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        total = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")
        return total / (labels != -100).sum().clamp(min=1)

    @torch.no_grad()
    def _count(self, balances: list[Balance]) -> None:
        if not self.training:
            return
        routers = [*self._routers.values()]
        backbone = sum(name.startswith("backbone") for name in self._routers)
        for i, balance in enumerate(balances):  # beyond the backbone's: the MTP block's, once for each depth
            i = i if i < backbone else backbone + (i - backbone) % (len(routers) - backbone)
            routers[i].load += balance.load

    def _depth(self, name: str) -> float | None:
        """Where in the stack of layers the module lies, 0 to 1; None outside of it."""
        parts = name.split(".")
        if parts[:2] != ["backbone", "layers"]:
            return None
        return (int(parts[2]) + 0.5) / self.config.num_hidden_layers


def block(config: HybridConfig, letter: str) -> Block:
    """The layer that a pattern's letter stands for."""
    c = config
    match letter:
        case "M":
            mixer = Mamba2(
                c.hidden_size, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size, c.n_groups, c.conv_kernel,
                c.use_conv_bias, c.mamba_proj_bias, c.layer_norm_epsilon, c.chunk_size, c.time_step_limit,
            )  # fmt: skip
        case "E":
            shared = c.moe_shared_expert_intermediate_size if c.n_shared_experts else None
            mixer = MoE(
                c.hidden_size, c.n_routed_experts, c.num_experts_per_tok, c.moe_intermediate_size, shared, c.moe_latent_size,
                c.routed_scaling_factor, c.n_group, c.topk_group, c.norm_topk_prob, c.mlp_bias,
            )  # fmt: skip
        case "*":
            mixer = Attention(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.attention_bias)
        case "-":
            mixer = MLP(c.hidden_size, c.intermediate_size, c.mlp_bias)
        case _:
            raise ValueError(f"hybrid_override_pattern: got letter {letter!r}; allowed: M, E, *, -")
    return Block(c.hidden_size, mixer, c.layer_norm_epsilon)


def _boundaries(ids: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """cu_seqlens, checked; None when documents are rows."""
    require(isinstance(ids, Tensor), "ids", type(ids).__name__, "an int64 tensor [batch, length]", TypeError)
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"ids: got {ids.dtype} {list(ids.shape)}; allowed: int64 [batch, length]")
    if cu_seqlens is None:
        return None
    integers("cu_seqlens", cu_seqlens)
    batch, length = ids.shape
    rows = torch.arange(0, batch * length + 1, max(length, 1), device=cu_seqlens.device)
    ascending = cu_seqlens.dim() == 1 and cu_seqlens.numel() > 1 and bool((cu_seqlens.diff() > 0).all())
    if (
        not ascending
        or not torch.isin(rows, cu_seqlens).all()
        or cu_seqlens[0] != 0
        or cu_seqlens[-1] != batch * length
    ):
        raise ValueError(
            f"cu_seqlens: got {cu_seqlens.tolist() if cu_seqlens.numel() < 20 else list(cu_seqlens.shape)}; allowed: ascending "
            f"from 0 to {batch * length}, with each multiple of {length} (the rows) among them"
        )
    return None if cu_seqlens.numel() == batch + 1 else cu_seqlens
