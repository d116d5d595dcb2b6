"""The training loop: micro-batches, clipping, the step, and what to do when a gradient is not finite.

It works with any module that has `loss(ids, labels, cu_seqlens) -> (.total, .lm, ...)`, `update_router_bias()` and
`expert_load()`. Everything that decides the next step is in `state()`, so that a resumed run continues bit for bit. Several
processes take the micro-batches in turn and make the step that one of them would make of all.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from nvfp4_kernels.nn.health import Health, observe
from nvfp4_kernels.nn.moe import Router
from nvfp4_kernels.nn.nonfinite import Origin, tripwire
from nvfp4_kernels.nn.quantized import QuantizedWeight
from nvfp4_kernels.train.data import Batch, Packer
from nvfp4_kernels.train.optimizer import load_state_tensors, state_tensors
from nvfp4_kernels.train.ranks import ALONE, Ranks, is_sharded, placed
from nvfp4_kernels.train.schedule import Schedule

PATIENCE = 10  # skipped steps in a row after which a run is lost and says so


class Diverged(RuntimeError):
    """Too many steps in a row had no finite gradient."""


@dataclass
class StepReport:
    """One step as it is logged. losses: nats a token, means over the step's targets. health: of this rank's micro-batches."""

    step: int
    losses: dict[str, float]
    gradient_norm: float
    lr: float
    tokens: int
    seconds: float
    skipped: Origin | None = None
    bad: bool = False
    health: Health | None = None
    expert_load: dict[str, float] = field(default_factory=dict)


class Trainer:
    """One model, its data and its optimizer, moved a step at a time; on each of `ranks` alike, each with the same data.

    accumulate: micro-batches of each rank that a step sums the gradients of.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Packer,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        accumulate: int = 1,
        clip: float = 1.0,
        health_every: int = 0,
        ranks: Ranks = ALONE,
    ):
        self.model, self.data, self.optimizer, self.schedule = model, data, optimizer, schedule
        self.accumulate, self.clip, self.health_every, self.ranks = accumulate, clip, health_every, ranks
        self.sharded = is_sharded(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.step, self.skipped, self.skipped_in_a_row, self.tokens, self.seconds = 0, 0, 0, 0, 0.0

    def state(self) -> dict:
        return {
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "micro_batches": self.micro_batches,
            "data": self.data.state(),
        }

    @property
    def micro_batches(self) -> int:
        """Of a step, on all ranks."""
        return self.accumulate * self.ranks.size

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """model: weights and buffers, the noise of stochastic rounding among them; optimizer; rng.

        They are the same on all ranks; of a sharded model rank 0 alone gets those of model and optimizer.
        """
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        model, optimizer = self.model.state_dict(), state_tensors(self.model, self.optimizer)
        return {"model": self.ranks.gathered(model), "optimizer": self.ranks.gathered(optimizer), "rng": rng}

    def load(self, state: dict, tensors: Callable[[str], dict[str, torch.Tensor]]) -> None:
        """On as many ranks as then, bit for bit; on others, whose micro-batches of a step are as many, but for rounding.

        Raises ValueError where they are not as many.
        """
        known = state.get("micro_batches", self.micro_batches)
        if known != self.micro_batches:
            raise ValueError(
                f"accumulate: got {self.accumulate} on {self.ranks.size} processes; allowed: what gives {known} micro-batches "
                "a step, as the run began with (do: change --accumulate, or torchrun's --nproc-per-node)"
            )
        like = self.model.state_dict()
        self.model.load_state_dict({n: placed(t, like.get(n, t)) for n, t in tensors("model").items()})
        load_state_tensors(self.model, self.optimizer, tensors("optimizer"))
        rng = tensors("rng")
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], self.device)
        self.data.load_state(state["data"])
        for name in ("step", "skipped", "skipped_in_a_row", "tokens", "seconds"):
            setattr(self, name, state[name])

    def run_step(self) -> StepReport:
        """One optimizer step over `accumulate` micro-batches; a step without finite gradients changes no weight."""
        begun = time.perf_counter()
        batches = self.next_batches()
        lr = self.schedule.at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        health = None
        if self.health_every and self.step % self.health_every == 0:
            with observe(self.model) as health:
                losses, before = self.accumulate_gradients(batches)
        else:
            losses, before = self.accumulate_gradients(batches)
        if not self.sharded:
            self.ranks.sum_gradients(self.parameters)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        norm = norm.full_tensor() if self.sharded else norm
        bad = not (math.isfinite(norm) and math.isfinite(losses["total"]))
        origin, load = None, {}
        if bad:
            origin = self.find_origin(batches, before)
        else:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
            self.optimizer.step()
            self.ranks.sum_(m.load for m in self.model.modules() if isinstance(m, Router))
            load = scalars(self.model.expert_load())
            self.model.update_router_bias()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(batch.ids.numel() for batch in batches) * self.ranks.size
        seconds = self.ranks.most(time.perf_counter() - begun)
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + tokens, self.seconds + seconds
        self.skipped, self.skipped_in_a_row = self.skipped + bad, self.skipped_in_a_row + 1 if bad else 0
        return StepReport(self.step, losses, float(norm), lr, tokens, seconds, origin, bad, health, load)

    def next_batches(self) -> list[Batch]:
        """This rank's: of the next micro-batches of all ranks each takes one in turn."""
        mine = []
        for i in range(self.micro_batches):
            if i % self.ranks.size == self.ranks.rank:
                mine.append(next(self.data))
            else:
                self.data.skip()
        return mine

    def accumulate_gradients(self, batches: list[Batch]) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """This rank's part of the gradients of the mean loss over the targets of all micro-batches (of a sharded model, the
        sum of the parts); also the losses, of all, and the buffers as they were before."""
        before = changing_buffers(self.model)
        (targets,) = self.ranks.total(sum(batch.targets for batch in batches))
        targets = max(targets, 1)  # without any, losses and gradients are 0
        sums: dict[str, float] = {}
        for batch in batches:
            share = batch.targets / targets  # micro-batches with fewer targets weigh less, as in one large batch
            losses = self.model.loss(*self.moved(batch))
            (losses.total * share).backward()
            for name, value in named_losses(losses).items():
                sums[name] = sums.get(name, 0.0) + float(value) * share
        return dict(zip(sums, self.ranks.total(*sums.values()), strict=True)), before

    def find_origin(self, batches: list[Batch], before: dict[str, torch.Tensor]) -> Origin | None:
        """Runs the same micro-batches again, from the same buffers and so the same noise, under the tripwire; leaves
        the buffers as they were before the step. Of several ranks' origins, one that is no sum of theirs, if there is one."""
        restore(self.model, before)
        self.optimizer.zero_grad(set_to_none=True)
        with tripwire(self.model) as caught:
            self.accumulate_gradients(batches)
        restore(self.model, before)
        origins = [origin for origin in self.ranks.all(caught.origin) if origin]
        return min(origins, key=lambda origin: origin.tensor.startswith("d") and origin.tensor != "dy", default=None)

    def moved(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return batch.ids.to(self.device), batch.labels.to(self.device), batch.cu_seqlens.to(self.device)

    @torch.no_grad()
    def validate(self, batches: Iterable[Batch]) -> float:
        """Mean lm loss in nats a token over all targets; leaves no trace in the model."""
        self.model.eval()
        batches, total, targets = list(batches), 0.0, 0
        for i in self.ranks.share(len(batches)):
            # beyond the last, one that does not count: layers are gathered by all
            batch = batches[min(i, len(batches) - 1)]
            counted = batch.targets if i < len(batches) else 0
            total += float(self.model.loss(*self.moved(batch)).lm) * counted
            targets += counted
        self.model.train()
        if self.sharded:
            self.model.reshard()
        total, targets = self.ranks.total(total, targets)
        return total / max(targets, 1)

    def check_patience(self) -> None:
        if self.skipped_in_a_row >= PATIENCE:
            raise Diverged(
                f"training: {PATIENCE} steps in a row without a finite gradient, up to step {self.step}; do: "
                "resume from an earlier checkpoint with a smaller --lr, or read the layers named above"
            )


def changing_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all buffers but the weights of quantized layers, which stay as they are."""
    weights = {name for name, module in model.named_modules() if isinstance(module, QuantizedWeight)}
    return {name: b.clone() for name, b in model.named_buffers() if name.rpartition(".")[0] not in weights}


def restore(model: nn.Module, buffers: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in buffers.items():
            model.get_buffer(name).copy_(buffer)


def named_losses(losses) -> dict[str, float]:
    """The model's Losses as floats; parts a model does not have are left out."""
    parts = {name: getattr(losses, name, None) for name in ("total", "lm", "mtp", "balance")}
    return {name: float(value.detach()) for name, value in parts.items() if value is not None}


def scalars(load: dict) -> dict[str, float]:
    """The single numbers among a model's load statistics."""
    return {
        k: float(v) for k, v in load.items() if not isinstance(v, (dict, list, tuple)) and torch.as_tensor(v).ndim == 0
    }
