"""Packed stacks times groups of few tokens in CUDA, on the host model, against loops over the decoded matrices in float64."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.formats.packed import pack
from nvfp4_kernels.ops.expert_mlp.op import expert_mlp
from nvfp4_kernels.ops.grouped_matmul import _cuda as grouped_cuda
from nvfp4_kernels.ops.grouped_matmul.op import grouped_matmul
from nvfp4_kernels.ops.matmul import _cuda, _cuda_sm90
from nvfp4_kernels.ops.matmul._cuda_launch import Groups
from nvfp4_kernels.ops.route.op import Routing, route
from tests import machine
from tests.formats.test_packed import random_weight
from tests.ops.test_grouped_matmul import error, offsets
from tests.oracles.experts_brute import decode, grouped, moe

LOADS = {
    "one token": [0, 0, 1, 0],
    "few each": [3, 0, 8, 9, 1, 2],
    "all to one": [0, 0, 64, 0],
    "one group": [17],
    "most empty": [0] * 60 + [5] + [0] * 100 + [1, 0, 2] + [0] * 40,
    "more groups than threads": [e % 5 // 4 for e in range(150)],
    "no tokens": [0, 0],
}


@pytest.fixture(autouse=True)
def forced():
    with nk.backend("native"):
        yield


def stacked(groups, rows, cols):
    """(packed, its values in float64): every code under every scale, and a global scale for each matrix."""
    w = [random_weight(rows, cols) for _ in range(groups)]
    codes, scales = (torch.stack([getattr(m, part) for m in w]) for part in ("codes", "scales"))
    g = torch.linspace(0.5, 2, groups) * 2.0**-8
    return Stack(*pack(codes, scales), g), decode(codes, scales, g)


def within(y, a, w, sizes):
    """fp32 sums of exact products: an error of 2^-24 for each of K sums at most, of the sum of magnitudes."""
    bound = grouped(a.double().abs(), w.abs(), sizes) * a.shape[1] * 2.0**-24
    return ((y - grouped(a.double(), w, sizes)).abs() <= bound).all()


def scattered(a):
    """(x, rows): a's rows anywhere among others, of NaN; x[rows] is a."""
    x = torch.full((2 * len(a) + 3, a.shape[1]), torch.nan, dtype=a.dtype)
    rows = torch.randperm(len(x))[: len(a)]
    x[rows] = a
    return x, rows


@pytest.mark.parametrize("load", LOADS)
def test_loads(model, load):
    sizes = LOADS[load]
    a, (packed, w) = torch.randn(sum(sizes), 144).bfloat16(), stacked(len(sizes), 32, 144)
    y = grouped_matmul(a, packed, offsets(sizes), torch.float32)
    assert within(y, a, w, sizes) and len(model.kernels) == bool(sum(sizes))
    assert torch.equal(grouped_matmul(a, packed, offsets(sizes)), y.bfloat16())
    x, rows = scattered(a)
    assert torch.equal(grouped_matmul(x, packed, offsets(sizes), torch.float32, rows), y)


@pytest.mark.parametrize("rows, cols", [(1856, 48), (48, 1856), (144, 128)])
def test_shapes(rows, cols):
    sizes = [1, 0, 12]
    a, (packed, w) = torch.randn(13, cols).bfloat16(), stacked(3, rows, cols)
    assert within(grouped_matmul(a, packed, offsets(sizes), torch.float32), a, w, sizes)


@pytest.mark.parametrize("most", _cuda.TOKENS)
def test_every_kernel_and_its_splits(model, monkeypatch, most):
    """Groups that need several slots; whichever split ends last, the same bits, and counters back at zero."""
    zeros = []
    monkeypatch.setattr(_cuda, "zeros", lambda n, device: zeros.append(torch.zeros(n, dtype=torch.int32)) or zeros[-1])
    sizes = [0, 2 * most + 1, 1, most, 0, 0, 0, 0] if most < 64 else [0, 65, 0, 60]
    a, (packed, w) = torch.randn(sum(sizes), 1024).bfloat16(), stacked(len(sizes), 16, 1024)
    made = []
    for seed in (None, 2, 3):  # odd seeds run the blocks from the last to the first
        model.seed = seed
        made.append(grouped_matmul(a, packed, offsets(sizes), torch.float32))
    assert set(model.kernels) == {f"weight_only_{most}"}
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2]) and within(made[0], a, w, sizes)
    assert len(zeros) == 3 and not torch.cat(zeros).any()


@pytest.mark.parametrize("rows, tile, sizes", [
    (16, 128, [1, 0, 130, 40]), (144, 256, [0, 0, 171, 0]), (272, 128, [17, 0, 1, 153]),
])  # fmt: skip
def test_large_groups(model, rows, tile, sizes):
    """More than fit a slot: the Hopper kernel, in whole tiles. Rows as they lie, and gathered."""
    a, (packed, w) = torch.randn(171, 272).bfloat16(), stacked(4, rows, 272)
    y = grouped_matmul(a, packed, offsets(sizes), torch.float32)
    assert model.kernels == [f"weight_only_tiles_{tile}"] and within(y, a, w, sizes)
    x, order = scattered(a)
    assert torch.equal(grouped_matmul(x, packed, offsets(sizes), rows=order), y.bfloat16())


def test_large_groups_elsewhere(model, monkeypatch):
    """Matrices decoded two at a time, the last alone, and multiplied in Triton: rows as they lie, and gathered."""
    monkeypatch.setattr(grouped_cuda._cuda, "refuses_arch", lambda arch, x: "another chip")
    monkeypatch.setattr(grouped_cuda, "LARGE", {None: 8})
    monkeypatch.setattr(grouped_cuda, "DECODED", 2 * 2 * 32 * 256)
    sizes = [1, 0, 40, 20, 3]
    a, (packed, w) = torch.randn(64, 144).bfloat16(), stacked(5, 32, 144)
    few = grouped_matmul(a[:39], packed, offsets([1, 0, 15, 20, 3]), torch.float32)
    assert model.kernels == ["weight_only_16"] and within(few, a[:39], w, [1, 0, 15, 20, 3])
    model.kernels.clear()
    with nk.backend("native", "triton"):
        y = grouped_matmul(a, packed, offsets(sizes), torch.float32)
        assert model.kernels == ["decode_packed"] * 3 and within(y, a, w, sizes)
        assert torch.equal(grouped_matmul(a, packed, offsets(sizes)), y.bfloat16())
        x, rows = scattered(a)
        assert torch.equal(grouped_matmul(x, packed, offsets(sizes), torch.float32, rows), y)
        packed.global_scales[2] = float("inf")
        y = grouped_matmul(a, packed, offsets(sizes))
        assert y[1:41].isnan().all() and y[0].isfinite().all() and y[41:].isfinite().all()
        routing, x = route(torch.randn(40, 4), None, 2, 2.5), torch.randn(40, 48).bfloat16() / 64
        (up, up_values), (down, down_values) = stacked(4, 32, 48), stacked(4, 48, 32)
        model.kernels.clear()
        y = expert_mlp(x, routing, up, down)
        truth = moe(x.double(), routing.indices, routing.weights.double(), up_values, down_values)
        assert error(y, truth) <= 2 * torch.finfo(torch.bfloat16).eps and set(model.kernels) == {"decode_packed"}


@pytest.mark.parametrize("sizes", [[4, 0, 3, *[0] * 500], [70, 0, 30]])
def test_empty_groups_are_not_read(sizes):
    """There is memory for the first matrices alone; the sanitizer looks on."""
    a, (packed, w) = torch.randn(sum(sizes), 128).bfloat16(), stacked(3, 16, 128)
    out = torch.empty(len(a), 16)
    _cuda.run_groups(a, packed, Groups(offsets(sizes)), out)
    assert within(out, a, w, sizes[:3])


@pytest.mark.parametrize("wrong", [[0, 9, 3, 12], [-5, 4, 40, 50], [12, 0, 12, 0], [1 << 40, (1 << 40) + 9, 12, 12]])
def test_wrong_routing_reaches_nothing_outside(wrong):
    """The sanitizer looks on; what is written is anybody's guess."""
    if machine.ON and wrong == [0, 9, 3, 12]:
        pytest.skip("groups that overlap write different rows to the same places, at which the machine stops")
    a, (packed, _) = torch.randn(6, 80).bfloat16(), stacked(3, 16, 80)
    for order in (None, torch.tensor([0, 11, -1, 12, 1 << 40, -(1 << 40), *range(6)])):
        x = a if order is not None else a.repeat(2, 1)
        groups = Groups(torch.tensor(wrong), order, 2)
        _cuda.run_groups(x, packed, groups, torch.empty(12, 16))
        _cuda_sm90.run_groups(x, packed, groups, torch.empty(12, 16), False)


@pytest.mark.parametrize(
    "tokens, experts, top_k, size, width",
    [
        (1, 8, 3, 80, 1856),
        (17, 8, 3, 48, 80),
        (9, 4, 4, 48, 80),
        (64, 16, 2, 48, 80),
        (70, 4, 2, 48, 80),
        (2, 4, 1, 1856, 48),
        (0, 4, 2, 16, 16),
    ],
)
def test_expert_mlp(model, tokens, experts, top_k, size, width):
    routing = route(torch.randn(tokens, experts), None, top_k, 2.5)
    x = torch.randn(tokens, 2 * size).bfloat16()[:, :size] / 64
    (up, up_values), (down, down_values) = stacked(experts, width, size), stacked(experts, size, width)
    y = expert_mlp(x, routing, up, down)
    truth = moe(x.double(), routing.indices, routing.weights.double(), up_values, down_values)
    assert y.dtype == torch.bfloat16 and error(y, truth) <= 2 * torch.finfo(torch.bfloat16).eps
    assert len(model.kernels) == (2 if tokens else 0)


def test_all_tokens_to_the_same_experts():
    routing = route(torch.randn(40, 6), torch.tensor([0.0, 9, 0, 9, 0, 0]), 2, 1.0)
    (up, up_values), (down, down_values) = stacked(6, 32, 48), stacked(6, 48, 32)
    x = torch.randn(40, 48).bfloat16() / 64
    truth = moe(x.double(), routing.indices, routing.weights.double(), up_values, down_values)
    assert error(expert_mlp(x, routing, up, down), truth) <= 2 * torch.finfo(torch.bfloat16).eps


def test_what_is_not_finite():
    sizes, (packed, _) = [3, 2, 4], stacked(3, 32, 128)
    a = torch.randn(9, 128).bfloat16()
    a[1, 77] = float("nan")
    packed.global_scales[2] = float("inf")
    y = grouped_matmul(a, packed, offsets(sizes))
    assert y[1].isnan().all() and y[[0, 2, 3, 4]].isfinite().all() and y[5:].isnan().all()
    routing = Routing(*(torch.tensor(t) for t in ([[0], [1]], [[1.0], [1.0]], [0, 1, 2, 2], [[0], [1]], [0, 1])))
    down, _ = stacked(3, 128, 32)
    assert expert_mlp(a[:2], routing, packed, down).isfinite().all(1).tolist() == [True, False]


def test_what_others_must_serve():
    (up, up_values), (down, down_values) = stacked(4, 32, 48), stacked(4, 48, 32)
    x, routing = torch.randn(5, 48), route(torch.randn(5, 4), None, 2, 1.0)
    with nk.backend("native", "reference"):  # the stacks are unpacked for them
        y = grouped_matmul(x, up, offsets([2, 0, 3, 0]))
        assert error(y, grouped(x.double(), up_values, [2, 0, 3, 0])) < 1e-6
        truth = moe(x.double(), routing.indices, routing.weights.double(), up_values, down_values)
        assert error(expert_mlp(x, routing, up, down), truth) < 1e-6


def test_slots():
    """As many as any sizes need, of twice the mean: Super's and Nano's experts."""
    assert _cuda.slots(22, 512) == (8, 22) and _cuda.slots(64 * 22, 512) == (8, 624)
    assert _cuda.slots(6, 128) == (8, 6) and _cuda.slots(8192 * 6, 128) == (64, 894)
    assert _cuda.slots(64, 1) == (64, 1) and _cuda.slots(9, 1) == (16, 1)
    assert _cuda.splits(8, 6 * 15, 2688) == 5 and _cuda.splits(8, 481 * 21, 1024) == 1
