"""nk.linear: its three GEMMs against an fp64 oracle that decodes the very operands, and its behaviour as a layer."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import nvfp4_kernels as nk
from nvfp4_kernels.autograd.linear import quantize_weight
from nvfp4_kernels.formats.spec import DEFAULT_SIGNS
from nvfp4_kernels.recipe import MXFP8, NVFP4
from tests.ops.test_hadamard import matrix
from tests.ops.test_matmul import error, values
from tests.oracles import nvfp4_brute as brute

BACKENDS = ("reference", "native")
RECIPES = {
    "nvfp4": NVFP4,
    "mxfp8": MXFP8,
    "no rht": NVFP4.switch(hadamard=False),
    "no sr": NVFP4.switch(stochastic=False),
    "1d weights": NVFP4.switch(two_dimensional=False),
    "four over six": NVFP4.switch(four_over_six="mae"),
    "forward only": nk.LinearRecipe(fprop_x=NVFP4.fprop_x, fprop_w=NVFP4.fprop_w),
    "weight only": nk.LinearRecipe(fprop_w=NVFP4.fprop_w, dgrad_w=NVFP4.dgrad_w),
    "stochastic forward": nk.LinearRecipe(fprop_x=nk.QuantSpec("1x16", "stochastic"), fprop_w=NVFP4.fprop_w),
}


def tensors(tokens=37, features=56, out=40, dtype=torch.float32):
    x = torch.randn(tokens, features).to(dtype).requires_grad_()
    w = (torch.randn(out, features) / 8).requires_grad_()
    return x, w, torch.randn(out, requires_grad=True), torch.randn(tokens, out).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RECIPES)
def test_three_gemms_equal_the_decoded_operands(name, backend):
    recipe, (x, w, b, dy) = RECIPES[name], tensors()
    noise = torch.tensor([3, 10])
    with nk.backend(backend):
        y = nk.linear(x, w, b, recipe, noise=noise)
        y.backward(dy)
    forward_draws = sum(s is not None and s.stochastic for s in (recipe.fprop_x, recipe.wgrad_x))
    x_row, x_col = nk.quantize_pair(x.detach(), recipe.fprop_x, recipe.wgrad_x, torch.tensor([3, 10]))
    w_row, w_col = nk.quantize_pair(w.detach(), recipe.fprop_w, recipe.dgrad_w)
    dy_row, dy_col = nk.quantize_pair(dy, recipe.dgrad_dy, recipe.wgrad_dy, torch.tensor([3, 10 + forward_draws]))
    assert error(y, values(x_row) @ values(w_row).t() + b.double()) < 1e-6
    assert error(x.grad, values(dy_row) @ values(w_col).t()) < 1e-6
    assert error(w.grad, values(dy_col) @ values(x_col).t()) < 1e-6
    assert error(b.grad, dy.double().sum(0)) < 1e-6
    total = forward_draws + sum(s is not None and s.stochastic for s in (recipe.dgrad_dy, recipe.wgrad_dy))
    assert noise.tolist() == [3, 10 + total]


def test_gradients_are_near_those_of_a_plain_linear():
    x, w, b, dy = tensors(512, 256, 128)
    nk.linear(x, w, b).backward(dy)
    x2, w2 = x.detach().requires_grad_(), w.detach().requires_grad_()
    F.linear(x2, w2).backward(dy)
    assert error(x.grad, x2.grad.double()) < 0.2 and error(w.grad, w2.grad.double()) < 0.2


def test_the_mean_gradient_of_the_weight_is_its_expectation():
    """Over the noise of 500 steps, within 5 standard errors: each element, and all of it along the expected gradient, where a
    bias of 4e-4 in all values shows. What block scales clip is in the expectation, and moves it by 1% (QuantSpec)."""
    x, w, _, _ = tensors(64, 128, 256)
    x = x.detach()
    dy = (torch.randn(64, 256) * 16).round() / 16  # whose transform is exact before it is rounded to bf16
    noise, forms, steps = torch.tensor([3, 0]), quantize_weight(w, NVFP4), 500
    for _ in range(steps):
        nk.linear(x, w, recipe=NVFP4, noise=noise, weight_forms=forms).backward(dy)
    rotated = (dy.double().t().unflatten(-1, (-1, 16)) @ matrix(DEFAULT_SIGNS)).flatten(-2).bfloat16()
    mean, variance = (torch.from_numpy(part) for part in brute.mean_and_variance(rotated.float().numpy()))
    x_col = values(nk.quantize(x, NVFP4.wgrad_x, transpose=True))
    expected, variances = mean @ x_col.t(), variance @ (x_col**2).t() / steps
    off = w.grad / steps - expected
    assert (off.abs() < 5 * variances.sqrt()).all()
    along = (variance * (expected @ x_col) ** 2).sum() / steps
    assert (off * expected).sum().abs() < 5 * along.sqrt() < 4e-4 * (expected**2).sum()
    assert 0.008 < error(expected, rotated.double() @ x_col.t()) < 0.012


def test_shapes_dtypes_and_empty_batches():
    w = torch.randn(24, 40, requires_grad=True)
    for lead in ((3, 5), (1,), (), (0,), (2, 0)):
        x = torch.randn(*lead, 40).bfloat16().requires_grad_()
        y = nk.linear(x, w)
        assert y.shape == (*lead, 24) and y.dtype == torch.bfloat16
        y.sum().backward()
        assert x.grad.shape == x.shape and x.grad.dtype == torch.bfloat16
        assert w.grad.dtype == torch.float32 and torch.isfinite(w.grad).all()
    x = torch.randn(6, 40, 7).transpose(1, 2)
    assert torch.equal(nk.linear(x, w.detach()), nk.linear(x.contiguous(), w.detach()))


def test_saves_the_quantized_column_form_and_not_x():
    """And of a frozen weight nothing of x at all, in whatever precision its gradient would have been."""
    x, w, _, _ = tensors(256, 128, 64, torch.bfloat16)
    for recipe in (NVFP4, replace(NVFP4, wgrad_x=None, wgrad_dy=None)):
        for frozen in (False, True):
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t
            ):
                nk.linear(x, w.detach() if frozen else w, recipe=recipe)
            of_x = 0 if frozen else 256 * 128 * 9 // 16 + 4 if recipe.wgrad_x else x.nbytes
            assert sum(sizes) == of_x + 64 * 128 * 9 // 16 + 4


def test_autocast():
    x, w, b, _ = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        y = nk.linear(x, w, b)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, nk.linear(x.bfloat16(), w, b))


def test_second_derivative_is_refused():
    x, w, _, _ = tensors()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(nk.linear(x, w).sum(), x, create_graph=True)


def test_frozen_parts_get_no_gradient():
    """And the other part has the gradient that it has beside them, noise included."""
    x, w, _, dy = tensors()
    noise = torch.tensor([5, 0])
    dx, dw = torch.autograd.grad(nk.linear(x, w, noise=noise.clone()), (x, w), dy)
    nk.linear(x.detach(), w, noise=noise.clone()).backward(dy)
    assert x.grad is None and torch.equal(w.grad, dw)
    x2 = x.detach().requires_grad_()
    nk.linear(x2, w.detach(), noise=noise.clone()).backward(dy)
    assert torch.equal(x2.grad, dx)


def test_given_forms_are_used():
    x, w, _, _ = tensors()
    assert torch.equal(nk.linear(x, w, weight_forms=quantize_weight(w, NVFP4)), nk.linear(x, w))


@pytest.mark.parametrize("name", ["nvfp4", "stochastic forward"])
def test_checkpointing_replays_the_noise(name):
    """Gradients with and without activation checkpointing are equal bit for bit, noise from the module or from torch's seed."""

    def gradients(wrap, own_noise):
        torch.manual_seed(1)
        recipe, (x, w, _, dy) = RECIPES[name], tensors()
        noises = [torch.tensor([seed, 0]) if own_noise else None for seed in (9, 4, 5)]

        def block(t):
            for weight, noise in zip((w, w.t(), w), noises, strict=True):
                t = nk.linear(torch.tanh(t), weight, recipe=recipe, noise=noise)
            return t

        y = checkpoint(block, x, use_reentrant=False) if wrap else block(x)
        y.backward(dy)
        return x.grad, w.grad

    for own_noise in (True, False):
        plain, wrapped = gradients(False, own_noise), gradients(True, own_noise)
        assert torch.equal(plain[0], wrapped[0]) and torch.equal(plain[1], wrapped[1])


@pytest.mark.parametrize(
    "call, error_type, words",
    [
        (lambda: nk.linear(torch.ones(2, 8), torch.ones(4, 9)), ValueError, "x: got last axis 8; allowed: 9"),
        (lambda: nk.linear(torch.ones(2, 8), torch.ones(8)), ValueError, "weight: got 1 dimensions"),
        (lambda: nk.linear(torch.ones(2, 8).double(), torch.ones(4, 8)), TypeError, "x: got torch.float64"),
        (lambda: nk.linear(torch.ones(2, 0), torch.ones(4, 0)), ValueError, "weight: got shape"),
        (lambda: nk.linear(torch.ones(2, 8), nk.quantize(torch.ones(4, 8))), TypeError, "NVFP4Tensor.* nk.weight_only"),
        (lambda: torch.func.vmap(nk.Linear(8, 4, recipe=NVFP4))(torch.ones(2, 8)), RuntimeError, "torch.func"),
        (
            lambda: torch.func.grad(lambda x: nk.linear(x, torch.ones(1, 8))[0])(torch.ones(8)),
            RuntimeError,
            "torch.func",
        ),
        (lambda: nk.linear(torch.ones(2, 8), torch.ones(4, 8), torch.ones(5)), ValueError, "bias: got shape"),
        (
            lambda: nk.linear(torch.ones(2, 8), torch.ones(4, 8), recipe="fp4"),
            ValueError,
            "recipe: got 'fp4'; allowed: bf16",
        ),
        (lambda: nk.linear(torch.ones(2, 8), torch.ones(4, 8, device="meta")), ValueError, "weight: got device meta"),
    ],
)
def test_bad_input_is_refused_by_name(call, error_type, words):
    with pytest.raises(error_type, match=words):
        call()
