"""The schedule's shape; which parameters decay; optimizer state by name."""

import math

import pytest
import torch
from torch import nn

from nvfp4_kernels.train.optimizer import build_optimizer, load_state_tensors, state_tensors
from nvfp4_kernels.train.schedule import Budget, Schedule, as_steps
from nvfp4_kernels.train.settings import Settings


def test_warmup_stable_decay():
    schedule = Schedule(1.0, steps=100, warmup=10, decay=20, floor=0.0)
    rates = [schedule.at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:81] == [1.0] * 71  # the decay begins from the peak
    assert all(a > b for a, b in zip(rates[80:], rates[81:], strict=False))
    assert rates[90] == pytest.approx(1 - math.sqrt(11 / 20)) and rates[99] == 0.0
    linear = Schedule(1.0, steps=100, decay=20, shape="linear", floor=0.1)
    assert [linear.at(0), linear.at(90), linear.at(99)] == pytest.approx([1.0, 1 - 0.9 * 11 / 20, 0.1])


def test_constant_and_beyond_the_end():
    assert {Schedule(2.0, steps=5).at(step) for step in range(9)} == {2.0}
    assert Schedule(2.0, steps=5, decay=5, floor=0.5).at(50) == 1.0


def test_unknown_end_stays_at_the_peak():
    assert [Schedule(1.0, None, warmup=2, decay=5).at(step) for step in (0, 1, 1000)] == [0.5, 1.0, 1.0]


def test_budget_decides_when_the_decay_is_what_is_left():
    share, steps = Budget(100.0, 0.4), Budget(100.0, 10)
    assert share.steps(10, 59.0) is None and share.steps(10, 60.0) == 17  # 40 s at 6 s a step
    assert steps.steps(10, 50.0) == 20 and steps.steps(10, 45.0) is None
    assert share.steps(3, 150.0) == 3  # one step that outlasts the budget ends the run


def test_shares_and_steps():
    assert as_steps(0.02, 500) == 10 and as_steps(100, 500) == 100 and as_steps(0, 500) == 0


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.proj, self.norm = nn.Embedding(4, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.A_log, self.up = nn.Parameter(torch.zeros(8, 1)), nn.Parameter(torch.randn(3, 8, 8))


def test_only_matrices_decay():
    model = Toy()
    optimizer = build_optimizer(model, 0.1, 0.5)
    decayed = {id(p) for g in optimizer.param_groups for p in g["params"] if g["weight_decay"]}
    assert decayed == {id(model.proj.weight), id(model.up)}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_half_precision_masters_are_refused():
    with pytest.raises(ValueError, match=r"model: got torch.bfloat16 for A_log; allowed: float32"):
        build_optimizer(Toy().bfloat16(), 0.1)


def test_state_survives_by_name():
    torch.manual_seed(0)
    first, second = Toy(), Toy()
    second.load_state_dict(first.state_dict())
    one, two = build_optimizer(first, 0.1), build_optimizer(second, 0.1)

    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    step(first, one, 1)
    second.load_state_dict(first.state_dict())
    load_state_tensors(second, two, state_tensors(first, one))
    step(first, one, 2)
    step(second, two, 2)
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(ValueError, match="knows a parameter other"):
        load_state_tensors(second, two, {"exp_avg.other": torch.zeros(1)})


def test_the_number_of_steps_lies_where_the_parameter_does():
    """On a GPU a fused kernel reads it there; a snapshot is read on the host."""
    model = nn.Linear(4, 4, device="meta")
    optimizer = torch.optim.AdamW(model.parameters())
    load_state_tensors(model, optimizer, {"step.weight": torch.tensor(3.0), "exp_avg.weight": torch.zeros(4, 4)})
    assert {part.device.type for part in optimizer.state[model.weight].values()} == {"meta"}


def test_an_unknown_shape_of_decay_is_refused():
    with pytest.raises(ValueError, match="decay_shape: got 'cosine'; allowed: minus-sqrt, linear"):
        Settings(decay_shape="cosine")
