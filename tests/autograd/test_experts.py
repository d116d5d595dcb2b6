"""The experts' matrices: each expert like a linear layer of its own."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.autograd.experts import expert_linear, experts, quantize_experts
from nvfp4_kernels.autograd.linear import linear, quantize_weight
from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.recipe import HIGH, MXFP8, NVFP4, LinearRecipe

SIZES = [5, 0, 17, 1, 0, 32]
OFFSETS = torch.tensor([0, *SIZES]).cumsum(0)
NEAREST = NVFP4.switch(stochastic=False)


def inputs(dtype=torch.float64, width=32, size=16):
    rows = sum(SIZES)
    x = torch.randn(rows, size, dtype=dtype, requires_grad=True)
    weight = torch.float32 if dtype == torch.bfloat16 else dtype
    up = torch.randn(len(SIZES), width, size, dtype=weight, requires_grad=True)
    down = torch.randn(len(SIZES), size, width, dtype=weight, requires_grad=True)
    return x, up, down, torch.rand(rows, dtype=weight, requires_grad=True)


def spans():
    start = 0
    for e, n in enumerate(SIZES):
        yield e, slice(start, start + n)
        start += n


@pytest.mark.parametrize("weighted", [True, False])
def test_high_precision_against_a_loop(weighted):
    x, up, down, weights = inputs()
    tensors = (x, up, down, weights) if weighted else (x, up, down)
    y = experts(x, up, down, OFFSETS, weights if weighted else None)
    expected = torch.cat(
        [((x[r] @ up[e].T).relu() ** 2 * (weights[r, None] if weighted else 1)) @ down[e].T for e, r in spans()]
    )
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for got, want in zip(torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, tensors, dy), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("recipe", [HIGH, NEAREST, MXFP8], ids=["high", "nvfp4-nearest", "mxfp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_expert_is_a_linear_layer(recipe, dtype):
    """But that the row forms of all rows of NVFP4 share one global scale: each expert's largest value is made all rows'."""
    x, up, _, _ = inputs(dtype)
    if recipe is not HIGH:
        x.detach()[:, 0] = x.detach().abs().max()
    y = expert_linear(x, up, OFFSETS, recipe)
    dy = torch.randn_like(y)
    if recipe is not HIGH:
        dy[:, 0] = dy.abs().max()
    dx, dup = torch.autograd.grad(y, (x, up), dy)
    for e, rows in spans():
        if rows.start == rows.stop:
            assert not dup[e].any()
            continue
        one, weight = x[rows].detach().requires_grad_(), up[e].detach().requires_grad_()
        if recipe is HIGH:
            wide, d = up[e].to(dtype).double(), dy[rows].double()
            wanted = [(y[rows], x[rows].double() @ wide.T, dtype), (dx[rows], d @ wide, dtype)]
            wanted += [(dup[e], d.T @ x[rows].double(), torch.float32)]
            for got, want, kept in wanted:
                assert (got.double() - want).norm() <= torch.finfo(kept).eps * want.norm()
            continue
        expected = linear(one, weight, recipe=recipe)
        assert torch.equal(y[rows], expected)
        dx_e, dw_e = torch.autograd.grad(expected, (one, weight), dy[rows])
        assert torch.equal(dx[rows], dx_e) and torch.equal(dup[e], dw_e)


def test_kept_forms_change_nothing_and_are_those_of_each_matrix():
    x, up, _, _ = inputs(torch.bfloat16)
    forms = quantize_experts(up, NEAREST)
    assert torch.equal(expert_linear(x, up, OFFSETS, NEAREST), expert_linear(x, up, OFFSETS, NEAREST, forms=forms))
    for e in range(len(SIZES)):
        row, _ = quantize_weight(up[e], NEAREST)
        assert torch.equal(forms[0].values[e], row.codes) and torch.equal(forms[0].global_scales[e], row.global_scale)


def test_stochastic_rounding_is_reproducible_and_fresh():
    x, up, _, _ = inputs(torch.bfloat16)
    dy = torch.randn(x.shape[0], up.shape[1]).bfloat16()
    noise = torch.tensor([7, 0])

    def gradient():
        return torch.autograd.grad(expert_linear(x, up, OFFSETS, NVFP4, noise), up, dy)[0]

    first, offset = gradient(), int(noise[1])
    assert offset > 0
    second = gradient()
    assert int(noise[1]) == 2 * offset and not torch.equal(first, second)
    noise[1] = 0
    assert torch.equal(gradient(), first)


def test_stochastic_rounding_is_unbiased():
    x, up, _, _ = inputs(torch.bfloat16)
    dy = torch.randn(x.shape[0], up.shape[1]).bfloat16()
    recipe, noise = LinearRecipe(wgrad_dy=QuantSpec("1x16", "stochastic")), torch.tensor([7, 0])
    draws = [torch.autograd.grad(expert_linear(x, up, OFFSETS, recipe, noise), up, dy)[0] for _ in range(64)]
    exact = torch.autograd.grad(expert_linear(x, up, OFFSETS, HIGH), up, dy)[0]
    assert (sum(draws) / 64 - exact).norm() < 0.2 * (draws[0] - exact).norm()


def test_no_rows_at_all():
    up = torch.randn(3, 32, 16, requires_grad=True)
    for recipe in (HIGH, NVFP4):
        y = expert_linear(torch.randn(0, 16, requires_grad=True), up, torch.zeros(4, dtype=torch.int64), recipe)
        y.sum().backward()
        assert y.shape == (0, 32) and not up.grad.any()


def test_errors_name_the_argument():
    x, up, down, _ = inputs()
    with pytest.raises(ValueError, match="groups: got 1 experts; allowed: 6, as many as the weight has"):
        experts(x, up, down, torch.tensor([0, 55]))
    with pytest.raises(ValueError, match="offsets: got .*; allowed: ascending numbers from 0 to 55"):
        with nk.backend("native"):
            experts(x.float(), up.float(), down.float(), torch.tensor([0, 5, 5, 22, 23, 23, 54]))
    with pytest.raises(TypeError, match="groups: got list; allowed: a Routing or a tensor"):
        experts(x, up, down, SIZES)
    with pytest.raises(ValueError, match=r"x: got shape \[55, 16\]; allowed: \[7, in\], as routed"):
        experts(x, up, down, nk.route(torch.randn(7, 6), None, 2))


@pytest.mark.parametrize("recipe", [HIGH, NVFP4], ids=["high", "nvfp4"])
def test_frozen_weights_cost_no_gradient(recipe, monkeypatch):
    """The same gradient of x from the same noise, and none of the products that only a weight's gradient needs."""
    from nvfp4_kernels.autograd import experts as module

    plain, calls, gradients = module.grouped_matmul, [], []
    monkeypatch.setattr(module, "grouped_matmul", lambda *a, **k: calls.append(1) or plain(*a, **k))
    x, up, _, _ = inputs(torch.float32)
    for frozen in (False, True):
        weight, noise = up.detach().clone().requires_grad_(not frozen), torch.tensor([7, 0])
        y = expert_linear(x, weight, OFFSETS, recipe, noise)
        calls.clear()
        y.backward(torch.ones_like(y))
        gradients.append((x.grad.clone(), noise.clone(), len(calls)))
        assert (weight.grad is None) == frozen
        x.grad = None
    (dx, noise, products), (frozen_dx, frozen_noise, fewer) = gradients
    assert torch.equal(dx, frozen_dx) and torch.equal(noise, frozen_noise) and products == 2 * fewer
