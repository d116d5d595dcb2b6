"""The experts: each like two linear layers of its own with the squared ReLU between them."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.autograd.experts import experts, quantize_experts
from nvfp4_kernels.autograd.linear import linear, quantize_weight
from nvfp4_kernels.formats.spec import QuantSpec
from nvfp4_kernels.ops.relu2.op import relu2
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
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_high_precision_against_a_loop(weighted, dtype, bound):
    given = inputs(dtype)[: 4 if weighted else 3]
    y = experts(*given[:3], OFFSETS, *given[3:])
    x, up, down = exact = [t.detach().to(dtype).double().requires_grad_() for t in given[:3]]
    exact += [t.detach().double().requires_grad_() for t in given[3:]]
    weights = exact[3][:, None] if weighted else torch.ones(len(x), 1)
    expected = torch.cat([((x[r] @ up[e].T).relu() ** 2 * weights[r]) @ down[e].T for e, r in spans()])
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, given, dy)
    wanted = torch.autograd.grad(expected, exact, dy.double())
    for got, want in zip((y, *gradients), (expected, *wanted), strict=True):
        assert (got.double() - want).norm() <= bound * want.norm()
    for gradient in gradients[1:3]:
        assert gradient.dtype == up.dtype if dtype == torch.float64 else torch.float32
        assert not any(gradient[e].any() for e, r in spans() if r.start == r.stop)


@pytest.mark.parametrize("recipe", [NEAREST, MXFP8], ids=["nvfp4-nearest", "mxfp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_expert_is_two_linear_layers(recipe, dtype):
    """Each by itself, since in NVFP4 the row forms of all rows share a global scale. In bf16 the gradient of the squares is not
    rounded on the way to that of the hidden values: a bit more or less of these turns some of their codes."""
    x, up, down, weights = inputs(dtype)
    for e, rows in spans():
        given = [t.detach().requires_grad_() for t in (x[rows], up[e : e + 1], down[e : e + 1], weights[rows])]
        if rows.start == rows.stop:
            continue
        y = experts(*given[:3], torch.tensor([0, len(given[0])]), given[3], (recipe, recipe))
        h = linear(given[0], given[1][0], recipe=recipe)
        expected, dy = linear(relu2(h, given[3]), given[2][0], recipe=recipe), torch.randn_like(y)
        gradients, wanted = (torch.autograd.grad(result, given, dy) for result in (y, expected))
        assert torch.equal(y, expected) and torch.equal(gradients[2], wanted[2])
        for i, bound in (0, 0), (1, 0), (3, 1e-5):
            difference = (gradients[i] - wanted[i]).norm() / wanted[i].norm()
            assert difference <= (bound if dtype == torch.float32 else 0.05)


def test_kept_forms_change_nothing_and_are_those_of_each_matrix():
    x, up, down, _ = inputs(torch.bfloat16)
    forms, recipes = tuple(quantize_experts(w, NEAREST) for w in (up, down)), (NEAREST, NEAREST)
    kept, made = (experts(x, up, down, OFFSETS, recipes=recipes, **given) for given in ({"forms": forms}, {}))
    assert torch.equal(kept, made)
    for e in range(len(SIZES)):
        row, _ = quantize_weight(up[e], NEAREST)
        assert torch.equal(forms[0][0].values[e], row.codes)
        assert torch.equal(forms[0][0].global_scales[e], row.global_scale)


def test_stochastic_rounding_is_reproducible_and_fresh():
    x, up, down, _ = inputs(torch.bfloat16)
    dy = torch.randn_like(x)
    noises = torch.tensor([7, 0]), torch.tensor([8, 0])

    def gradients():
        y = experts(x, up, down, OFFSETS, None, (NVFP4, NVFP4), noises)
        return torch.autograd.grad(y, (up, down), dy)

    first, offsets = gradients(), [int(noise[1]) for noise in noises]
    assert min(offsets) > 0
    second = gradients()
    assert [int(noise[1]) for noise in noises] == [2 * offset for offset in offsets]
    assert not any(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    for noise in noises:
        noise[1] = 0
    assert all(torch.equal(one, two) for one, two in zip(first, gradients(), strict=True))


def test_stochastic_rounding_is_unbiased():
    x, up, down, _ = inputs(torch.bfloat16)
    dy, recipe, noise = (
        torch.randn_like(x),
        LinearRecipe(wgrad_dy=QuantSpec("1x16", "stochastic")),
        torch.tensor([7, 0]),
    )

    def gradient(recipe):
        return torch.autograd.grad(experts(x, up, down, OFFSETS, None, (HIGH, recipe), (None, noise)), down, dy)[0]

    draws, exact = [gradient(recipe) for _ in range(64)], gradient(HIGH)
    assert (sum(draws) / 64 - exact).norm() < 0.2 * (draws[0] - exact).norm()


def test_no_rows_at_all():
    up, down = torch.randn(3, 32, 16, requires_grad=True), torch.randn(3, 16, 32, requires_grad=True)
    for recipe in (HIGH, NVFP4):
        x = torch.randn(0, 16, requires_grad=True)
        y = experts(x, up, down, torch.zeros(4, dtype=torch.int64), recipes=(recipe, recipe))
        y.sum().backward()
        assert y.shape == (0, 16) and not up.grad.any() and not down.grad.any()


def test_recipes_by_name_and_one_for_both():
    x, up, down, _ = (t.detach() for t in inputs(torch.bfloat16))
    noise = torch.tensor([1, 2])

    def run(recipes):
        return experts(x, up, down, OFFSETS, recipes=recipes, noises=(noise, noise))

    both, first = run((NVFP4, NVFP4)), run((NVFP4, HIGH))
    assert torch.equal(run("nvfp4"), both) and torch.equal(run(NVFP4), both) and not torch.equal(first, both)
    assert torch.equal(run(("nvfp4", "bf16")), first)
    with pytest.raises(ValueError, match="recipe: got 'fp3'"):
        run("fp3")


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
    for given, message in (
        ((None, up, down, OFFSETS), "x: got NoneType; allowed: a floating-point tensor"),
        ((x, up.int(), down, OFFSETS), "up: got torch.int32"),
        ((x, up, None, OFFSETS), "down: got NoneType"),
        ((x, up, down, OFFSETS.int()), "groups: got torch.int32; allowed: int64"),
        ((x, up[0], down, OFFSETS), r"up: got shape .*; allowed: \[experts, width, 16\]"),
        ((x, up, down[:, :, 1:], OFFSETS), r"down: got shape \[6, 16, 31\]; allowed: \[6, 16, 32\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            experts(*given)


def test_autocast():
    x, up, down, weights = (t.detach() for t in inputs(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, up, down, OFFSETS, weights)
    assert torch.equal(y, experts(x.bfloat16(), up, down, OFFSETS, weights))


@pytest.mark.parametrize("recipe", [HIGH, NVFP4], ids=["high", "nvfp4"])
def test_frozen_weights_cost_no_gradient(recipe, monkeypatch):
    """The same gradients of the others from the same noise, and none of the products that only a weight's gradient needs. The
    squares and the hidden values' gradient come with their amaxes, and with those of what is rotated of them: the same bits."""
    from nvfp4_kernels.autograd import experts as module

    plain, quantize, products, amaxes, results = module.grouped_matmul, module.quantize_groups, [], [], []
    monkeypatch.setattr(module, "grouped_matmul", lambda *a, **k: products.append(1) or plain(*a, **k))

    def noting(*given):
        amaxes.append(given[5])
        return quantize(*given[:5], given[5] if results else None)

    monkeypatch.setattr(module, "quantize_groups", noting)
    x, up, down, weights = inputs(torch.float32)
    for frozen in (), (), (0,), (1,), (0, 1):  # the first time the amaxes are kept back
        noises = torch.tensor([7, 0]), torch.tensor([8, 0])
        trained = [w.detach().clone().requires_grad_(e not in frozen) for e, w in enumerate((up, down))]
        leaves = [x, weights, *(w for w in trained if w.requires_grad)]
        products.clear(), amaxes.clear()
        y = experts(x, *trained, OFFSETS, weights, (recipe, recipe), noises)
        made = iter(torch.autograd.grad(y, leaves, torch.ones_like(y)))
        gradients = [next(made), next(made), *(None if e in frozen else next(made) for e in range(2))]
        assert len(products) == 4 - len(frozen)
        if recipe is NVFP4:  # of x, of the squares, of dy and of the hidden values' gradient
            assert [None if most is None else most.shape for most in amaxes] == [None, (3, 6), None, (3, 6)]
            turned = [bool(amaxes[1][2].any()), bool(amaxes[3][2].any())]
            assert turned == [1 not in frozen, 0 not in frozen]
        results.append([*noises, *gradients])
    for other in results[1:]:
        assert all(got is None or torch.equal(got, want) for got, want in zip(other, results[0], strict=True))
