"""Two processes that torch.distributed joins, and what tests have them do; run as a script it is one of the two.

Each call of a Pair runs a function of this file in both, as function(ranks, *arguments), and gives both results.
"""

import copy
import math
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import nvfp4_kernels as nk
from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.nn.block import Block
from nvfp4_kernels.nn.mamba2 import Mamba2
from nvfp4_kernels.nn.moe import Experts, MoE
from nvfp4_kernels.nn.quantized import FP8Weight, NVFP4Weight, QuantizedWeight
from nvfp4_kernels.recipe import get_recipe
from nvfp4_kernels.train import run as runs
from nvfp4_kernels.train.data import Packer
from nvfp4_kernels.train.loop import Trainer
from nvfp4_kernels.train.optimizer import build_optimizer
from nvfp4_kernels.train.ranks import Ranks, is_sharded, joined, shard
from nvfp4_kernels.train.schedule import Schedule
from nvfp4_kernels.train.settings import Settings

ROOT = Path(__file__).parents[2]
CONFIG = HybridConfig(
    "ME*", vocab_size=260, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16, mamba_num_heads=4,
    mamba_head_dim=16, ssm_state_size=16, n_groups=1, chunk_size=16, n_routed_experts=5, num_experts_per_tok=2,
    moe_intermediate_size=32, moe_shared_expert_intermediate_size=32, moe_latent_size=16, num_nextn_predict_layers=1,
    eos_token_id=258, pad_token_id=256, bos_token_id=257,
)  # fmt: skip
RECIPES = {
    "bf16": get_recipe("bf16"),
    "nvfp4": get_recipe("nvfp4"),
    "nearest": get_recipe("nvfp4").switch(stochastic=False),
}


class Pair:
    """Two processes, started at the first call, and anew after one that failed."""

    def __init__(self):
        self.processes = []

    def start(self) -> None:
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        common |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__],
                env=os.environ | common | {"RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(2)
        ]

    def __call__(self, function, *arguments) -> list:
        if not self.processes:
            self.start()
        for process in self.processes:
            pickle.dump((function.__name__, arguments), process.stdin)
            process.stdin.flush()
        results, waiting = {}, {p.stdout: rank for rank, p in enumerate(self.processes)}
        while waiting:
            for pipe in select.select(list(waiting), [], [])[0]:
                rank = waiting.pop(pipe)
                failed, results[rank] = pickle.load(pipe)
                if failed:  # the other may wait for it
                    self.close()
                    raise AssertionError(f"rank {rank}: {results[rank]}")
        return [results[0], results[1]]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes = []


def serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed goes elsewhere
    with joined() as ranks:
        while True:
            try:
                name, arguments = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            try:
                answer = False, globals()[name](ranks, *arguments)
            except Exception:
                answer = True, traceback.format_exc()
            pickle.dump(answer, answers)
            answers.flush()


def trainer(
    ranks: Ranks, recipe: str, sharded: bool, accumulate: int = 1, clip: float = math.inf, **changes
) -> Trainer:
    """Documents of different lengths, so that micro-batches have different numbers of targets."""
    torch.manual_seed(3)
    model = nk.HybridModel(CONFIG.replace(**changes), RECIPES[recipe])
    if sharded:
        model.checkpoint_activations = True
        shard(model)
    starts = np.cumsum(np.arange(3, 90))
    spans = np.stack([starts[:-1], starts[1:]], 1)
    data = Packer((np.arange(starts[-1]) * 7 % 251).astype(np.uint8), spans, 2, 24, 0)
    return Trainer(model, data, build_optimizer(model, 1e-2), Schedule(1e-2, 20), accumulate, clip, ranks=ranks)


def outcome(t: Trainer) -> tuple[list, dict[str, torch.Tensor]]:
    """Losses and norms of three steps, and the model after them (of a sharded one, on rank 0)."""
    reports = [t.run_step() for _ in range(3)]
    model = t.tensors()["model"]
    return [(r.losses, r.gradient_norm, r.tokens, r.expert_load) for r in reports], model


def steps(ranks: Ranks, *arguments):
    return outcome(trainer(ranks, *arguments))


def load_of(ranks: Ranks) -> list[int]:
    """The routers' load of one step, before it moves a bias."""
    t = trainer(ranks, "bf16", False)
    seen = []
    t.model.update_router_bias = lambda: seen.extend(n for r in t.model.routers().values() for n in r.load.tolist())
    t.run_step()
    return seen


def rounded_gradient(ranks: Ranks):
    """Twice the same input and the same layer: what backward gives, and the layer's noise after it."""
    torch.manual_seed(0)
    layer, x = nk.Linear(32, 48, recipe=RECIPES["nvfp4"].default), torch.randn(32, 32, requires_grad=True)
    layer(x).square().sum().backward()
    return x.grad, layer.weight.grad, layer.noise


def bad_on_one(ranks: Ranks, sharded: bool):
    """A step whose gradient is bad on rank 1 alone, then a good one."""
    t = trainer(ranks, "nvfp4", sharded)
    before = {name: tensor.clone() for name, tensor in t.tensors()["model"].items()}
    layer = t.model.backbone.layers[0].mixer.in_proj
    handle = layer.register_forward_hook(lambda m, args, y: y * math.nan if ranks.rank == 1 else y)
    report = t.run_step()
    after = t.tensors()["model"]
    handle.remove()
    unchanged = all(tensor.equal(after[name]) for name, tensor in before.items())
    return report.bad, str(report.skipped), unchanged, t.run_step().bad, t.skipped, t.tensors()["model"]


def validated(ranks: Ranks, sharded: bool) -> float:
    t = trainer(ranks, "bf16", sharded)
    return t.validate([next(t.data) for _ in range(3)])


def train(ranks: Ranks, settings: Settings, resume: bool = False, stop_after: int = 0):
    """A run, or what it says when it refuses; rank 1 alone gets a signal after `stop_after` steps. Plots stay empty."""
    real = Trainer.run_step

    def run_step(self):
        report = real(self)
        if ranks.rank == 1 and report.step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    with (
        patch.object(Trainer, "run_step", run_step),
        patch.object(runs, "plot_loss", lambda runs, target, unit: target.touch()),
        patch.object(runs, "plot_health", lambda metrics, target: target.touch()),
    ):
        try:
            result = runs.train(settings, resume, ranks=ranks)
        except ValueError as error:
            return str(error)
    return result.steps, result.stopped, result.validation_loss, result.tokens_per_second


def train_apart(ranks: Ranks, settings: Settings, elsewhere: str):
    """Resumed where rank 1 has a folder of its own, with a run in it that has no snapshot."""
    if ranks.rank == 1:
        settings = settings.replace(out=elsewhere)
        Path(elsewhere).mkdir()
        (Path(elsewhere) / "run.json").write_text(settings.to_json())
    return train(ranks, settings, True)


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.equal(two[name]), name


class Mine(nn.Module):
    """Somebody's model."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 32)) for _ in range(3)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def make(kind: str, recipe: str) -> nn.Module:
    """A model by `kind`: converted, "frozen" (with two quantized matrices), or a layer of ours."""
    torch.manual_seed(5)
    match kind:
        case "mamba":
            model = Block(32, Mamba2(32, 4, 16, 16, 1))
        case "moe":
            model = Block(32, MoE(32, 4, 2, 32, 32, 16))
        case _:
            model = nk.convert(Mine(), RECIPES[recipe])
    if kind in ("mamba", "moe"):
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.1)
        for module in model.modules():
            if isinstance(module, Experts):
                module.recipes = dict.fromkeys(module.recipes, RECIPES[recipe].default)
        nk.convert(model, RECIPES[recipe].default, include="*")
    if kind == "frozen":
        one, two = model.layers[0][1], model.layers[1][1].requires_grad_(False)
        model.layers[0][1] = NVFP4Weight.from_tensors(nk.quantize(one.weight.detach(), block="16x16"), one.bias)
        scale = two.weight.detach().abs().amax() / 448
        model.layers[1][1] = FP8Weight.from_tensors((two.weight / scale).to(torch.float8_e4m3fn), scale, two.bias)
    return model


def wrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        frozen = any(isinstance(module, QuantizedWeight) for module in model.modules())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has another name for it
            return DistributedDataParallel(model, broadcast_buffers=False) if frozen else DistributedDataParallel(model)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if how == "fsdp bf16" else MixedPrecisionPolicy()
    for part in (*getattr(model, "layers", ()), model):
        fully_shard(part, mp_policy=policy)
    return model


def half(rank: int) -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(11))[rank]


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return (y[0] if isinstance(y, tuple) else y).float().square().mean()


def alone(kind: str, recipe: str, dtype: torch.dtype, steps: int = 2):
    """What `parallel` gives, of one process that takes both halves one after the other and means their gradients."""
    model = make(kind, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        low = copy.deepcopy(model).to(dtype)
        for rank in range(2):
            low.zero_grad()
            loss(low, half(rank).to(dtype)).backward()
            for p, q in zip(model.parameters(), low.parameters(), strict=True):
                p.grad = q.grad.float() / 2 + (0 if p.grad is None else p.grad)
        optimizer.step()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return gradients, whole(model.state_dict())


def parallel(ranks: Ranks, kind: str, recipe: str, how: str):
    """Gradients of the second of two steps, and the state after it, whole."""
    model = wrapped(make(kind, recipe), how)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, half(ranks.rank)).backward()
        optimizer.step()
    return whole({name: p.grad for name, p in model.named_parameters()}), whole(model.state_dict())


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the model's own names, shards gathered; fp8 as bytes, since it does not pickle."""
    made = {name.removeprefix("module."): t.full_tensor() if is_sharded(t) else t for name, t in tensors.items()}
    return {name: t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for name, t in made.items()}


def reloaded(ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Before and after other weights are loaded without a step of an optimizer; and how many forms a layer still holds."""
    model = wrapped(make("converted", "nearest"), "fsdp")
    x = half(0)
    with torch.no_grad():
        before = model(x)
        model.reshard()
        model.load_state_dict({name: t * 2 for name, t in model.state_dict().items()})
        after = model(x)
    held = sum(layer[1]._forms._forms is not None for layer in model.layers)
    return before, after, held


def same_input(ranks: Ranks) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """With rank 0's buffers sent to all, as DistributedDataParallel does by default: the gradient of one input on both."""
    model = wrapped(make("converted", "nvfp4"), "ddp")
    for _ in range(2):
        x = half(0).requires_grad_()
        loss(model, x).backward()
    return x.grad, model.module.state_dict()


if __name__ == "__main__":
    serve()
