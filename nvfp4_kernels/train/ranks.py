"""The processes that train one model together, as torchrun starts them: what they sum up, agree on and leave to the first.

Replicated, each has the whole model, and the gradients are summed when a step's last micro-batch is done. Sharded, parameters,
gradients and optimizer state are split by torch's fully_shard, which gathers a layer when it runs. Alone, nothing is sent.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nvfp4_kernels.model.hybrid import HybridModel
from nvfp4_kernels.ops._device import default_device, rank

BUCKET = 1 << 23  # numbers summed in one message: of many small ones each pays its latency
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The number of this process, and how many there are. What is not said to be local is called by all of them alike."""

    rank: int = 0
    size: int = 1

    def total(self, *values: float) -> list[float]:
        """Each value summed over the ranks."""
        return self._reduced(values, "SUM")

    def most(self, value: float) -> float:
        """The largest of the ranks' values."""
        return self._reduced((value,), "MAX")[0]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Sums tensors of one dtype over the ranks, in place."""
        if self.size == 1:
            return
        for bucket in buckets(tensors):
            flat = torch.cat([t.flatten() for t in bucket])
            dist.all_reduce(flat)
            for t, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.copy_(summed.view_as(t))

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Sums gradients over the ranks; one that is missing here and not elsewhere counts as zeros."""
        present = self._reduced([p.grad is not None for p in parameters], "MAX")
        for p, somewhere in zip(parameters, present, strict=True):
            if somewhere and p.grad is None:
                p.grad = torch.zeros_like(p)
        self.sum_(p.grad for p in parameters if p.grad is not None)

    def all(self, value: T) -> list[T]:
        """The value of each rank, by rank; anything that pickles."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def first(self, do: Callable[[], object]) -> None:
        """Does it on rank 0, while the others wait; where it fails there, the same error is raised on all."""
        error = None
        if self.rank == 0:
            try:
                do()
            except Exception as caught:
                error = caught
        if error := self.all(error)[0]:
            raise error

    def share(self, count: int) -> list[int]:
        """Which of `count` things in turn are this rank's; all get as many, some of them numbers beyond the last."""
        return list(range(self.rank, -(-count // self.size) * self.size, self.size))

    def gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors; if they are sharded, whole, on the host of rank 0 and nowhere else."""
        if not any(is_sharded(t) for t in tensors.values()):
            return tensors
        whole = ((name, t.full_tensor() if is_sharded(t) else t) for name, t in tensors.items())
        return {name: t.cpu() for name, t in whole if self.rank == 0}

    def _reduced(self, values: Iterable[float], how: str) -> list[float]:
        values = list(values)
        if self.size == 1:
            return values
        reduced = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(reduced, getattr(dist.ReduceOp, how))
        return reduced.tolist()


ALONE = Ranks()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun, or who else sets its environment variables, has started; else this one alone."""
    if "MASTER_ADDR" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    if default_device() == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    try:
        yield Ranks(rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """In order, as many at a time as stay within BUCKET, and at least one."""
    bucket, size = [], 0
    for t in tensors:
        if bucket and size + t.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(t)
        size += t.numel()
    if bucket:
        yield bucket


def shard(model: HybridModel) -> None:
    """Splits the model over all ranks, each layer by itself and the rest, with multi-token prediction, in one piece.

    Micro-batches' gradients are summed over the ranks one by one: what is kept of them is the shard.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for part in (*model.backbone.layers, model):
        fully_shard(part)
        part.set_gradient_divide_factor(1.0)  # the losses are shares of one mean already
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other
    register_fsdp_forward_method(model, "loss")


def is_sharded(thing: Tensor | nn.Module) -> bool:
    """Of a tensor, whether a rank has a part of it; of a model, whether `shard` was called."""
    return hasattr(thing, "full_tensor" if isinstance(thing, Tensor) else "reshard")


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, or this rank's shard of it where `like` is sharded, split alike and on the same device."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
