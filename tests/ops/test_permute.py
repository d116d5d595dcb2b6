"""permute and unpermute against loops over tokens and choices."""

from dataclasses import replace

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.autograd.experts import experts
from nvfp4_kernels.ops.expert_mlp.op import expert_mlp
from nvfp4_kernels.ops.permute.op import permute, unpermute
from nvfp4_kernels.ops.route.op import Routing, route


@pytest.fixture
def routing():
    return route(torch.randn(9, 5, dtype=torch.float64), None, 3)


def test_rows_follow_their_slots(routing):
    x = torch.randn(9, 4, dtype=torch.float64)
    rows = permute(x, routing)
    for token in range(9):
        for choice in range(3):
            assert torch.equal(rows[routing.inverse[token, choice]], x[token])


@pytest.mark.parametrize("weighted", [True, False])
def test_sums_come_back(routing, weighted):
    y = torch.randn(27, 4, dtype=torch.float64)
    weights = routing.weights if weighted else None
    out = unpermute(y, routing, weights)
    for token in range(9):
        total = torch.zeros(4, dtype=torch.float64)
        for choice in range(3):
            total += y[routing.inverse[token, choice]] * (weights[token, choice] if weighted else 1)
        torch.testing.assert_close(out[token], total)


def test_gradcheck(routing):
    x = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(27, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, routing), x)
    assert torch.autograd.gradcheck(lambda y, w: unpermute(y, routing, w), (y, weights))
    assert torch.autograd.gradcheck(lambda y: unpermute(y, routing), y)


def test_there_and_back_is_top_k_times_the_token(routing):
    x = torch.randn(9, 4).bfloat16()
    torch.testing.assert_close(unpermute(permute(x, routing), routing), 3 * x, rtol=2**-7, atol=0)


@pytest.mark.parametrize(
    "tokens, experts, top_k, features", [(9, 5, 3, 4), (1, 4, 2, 33), (0, 4, 2, 8), (40, 3, 3, 130)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_values_and_gradients(backend, tokens, experts, top_k, features, dtype):
    """Against fp64 loops, forward and backward, with rows apart in memory."""
    routing = route(torch.randn(tokens, experts), None, top_k)
    x = torch.randn(tokens, 2 * features).to(dtype)[:, :features].requires_grad_()
    y = torch.randn(tokens * top_k, features).to(dtype).requires_grad_()
    weights = torch.rand(tokens, top_k, requires_grad=True)
    rows, out, plain = permute(x, routing), unpermute(y, routing, weights), unpermute(y, routing)
    wide_x, wide_y, wide_weights = (t.detach().double().requires_grad_() for t in (x, y, weights))
    wanted_rows = torch.zeros(tokens * top_k, features, dtype=torch.float64)
    for slot, row in enumerate(routing.inverse.flatten().tolist()):
        wanted_rows[row] = wide_x[slot // top_k].detach()
    assert torch.equal(rows.double(), wanted_rows)
    chosen = wide_y[routing.inverse.flatten()].view(tokens, top_k, features)
    unit = max(torch.finfo(dtype).eps, 1e-6)
    pairs = [(out, (chosen * wide_weights[:, :, None]).sum(1), (y, weights), (wide_y, wide_weights))]
    pairs += [(plain, chosen.sum(1), (y,), (wide_y,))]
    for got, wanted, leaves, wide_leaves in pairs:
        dout = torch.randn_like(got)
        gradients = torch.autograd.grad(got, leaves, dout)
        expected = torch.autograd.grad(wanted, wide_leaves, dout.double(), retain_graph=True)
        for g, w in [(got, wanted), *zip(gradients, expected, strict=True)]:
            assert g.dtype in (dtype, torch.float32) and (g.double() - w).norm() <= unit * w.norm()
    drows = torch.randn_like(rows)
    (dx,) = torch.autograd.grad(rows, x, drows)
    wanted = drows.double()[routing.inverse.flatten()].view(tokens, top_k, features).sum(1)
    assert (dx.double() - wanted).norm() <= unit * wanted.norm()


def test_native_takes_no_rows_out_of_range(routing):
    for step in (1, -1):
        wrong = Routing(routing.indices, routing.weights, routing.offsets, routing.inverse + step, routing.order + step)
        with nk.backend("native"):
            with pytest.raises(ValueError, match="routing: got rows out of range"):
                permute(torch.zeros(9, 4), wrong)
            with pytest.raises(ValueError, match="routing: got rows out of range"):
                unpermute(torch.zeros(27, 4), wrong)
            y = torch.zeros(27, 4, requires_grad=True)
            out = unpermute(y, Routing(*list(vars(routing).values())[:4], wrong.order), torch.ones(9, 3))
            with pytest.raises(ValueError, match="routing: got rows out of range"):
                out.sum().backward()


def test_errors_name_the_argument(routing):
    with pytest.raises(ValueError, match=r"x: got shape \[8, 4\]; allowed: \[9, features\]"):
        permute(torch.zeros(8, 4), routing)
    with pytest.raises(ValueError, match="y: got shape"):
        unpermute(torch.zeros(26, 4), routing)
    with pytest.raises(ValueError, match="weights: got shape"):
        unpermute(torch.zeros(27, 4), routing, torch.zeros(9, 2))


@pytest.mark.parametrize(
    "part, wrong",
    [
        ("order", lambda order: order[:5]),
        ("order", torch.Tensor.int),
        ("inverse", lambda inverse: inverse[:5]),
        ("inverse", lambda inverse: inverse.t().contiguous().t()),
        ("offsets", lambda offsets: offsets.repeat_interleave(2)[::2]),
        ("weights", lambda weights: weights[:5]),
    ],
)
def test_a_routing_whose_parts_do_not_fit(routing, part, wrong):
    """Kernels would read beyond its end, or in another order."""
    bad = replace(routing, **{part: wrong(getattr(routing, part))})
    x, up, down = torch.zeros(9, 4), torch.zeros(5, 6, 4), torch.zeros(5, 4, 6)
    calls = (
        permute,
        lambda x, r: unpermute(x, r),
        lambda x, r: expert_mlp(x, r, up, down),
        lambda x, r: experts(x, up, down, r),
    )
    for call in calls:
        with pytest.raises(
            ValueError, match="routing: got parts of other shapes, types, strides or devices; allowed: "
        ):
            call(x, bad)
