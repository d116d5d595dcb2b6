"""The experts' training step against a loop over experts in fp64 that decodes the very operands of each product."""

import itertools

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.autograd import experts as module
from nvfp4_kernels.autograd.experts import experts, quantize_experts
from nvfp4_kernels.formats.groups import Columns, Stack
from nvfp4_kernels.formats.spec import DEFAULT_SIGNS, QuantSpec
from nvfp4_kernels.nn.moe import MoE
from nvfp4_kernels.ops.permute.op import permute, unpermute
from nvfp4_kernels.recipe import HIGH, MXFP8, NVFP4, LinearRecipe
from tests.oracles.experts_brute import E2M1, E4M3, groups_of

# tokens, experts, top_k, width, hidden, which experts the tokens choose
LOADS = {
    "17 tokens": (17, 8, 3, 48, 32, None),
    "all to one": (40, 4, 1, 32, 16, [2]),
    "most are idle": (30, 32, 2, 32, 48, [5, 17]),
    "1 token": (1, 4, 2, 48, 32, None),
    "no token": (0, 4, 2, 48, 32, None),
    "top_k is all": (9, 4, 4, 48, 64, None),
    "Nano's width": (20, 4, 2, 1856, 48, None),
    "odd widths": (21, 3, 2, 40, 23, None),
}
MIXES = {
    "nvfp4": NVFP4,
    "nvfp4 1d": NVFP4.switch(two_dimensional=False, stochastic=False, hadamard=False),
    "mxfp8": MXFP8,
    "forward alone": LinearRecipe(fprop_x=QuantSpec("1x16"), fprop_w=QuantSpec("16x16")),
    "one of each": LinearRecipe(
        fprop_w=QuantSpec("16x16"), dgrad_dy=QuantSpec("1x16", "stochastic"), wgrad_x=QuantSpec("1x32")
    ),
    "other of each": LinearRecipe(
        fprop_x=QuantSpec("1x16", "stochastic"), dgrad_w=QuantSpec("1x32"), wgrad_dy=QuantSpec("1x16", "stochastic")
    ),
    "two formats": LinearRecipe(*[QuantSpec(block) for block in ("1x16", "1x32", "1x32", "16x16", "1x32", "1x16")]),
}


def routing_of(load):
    tokens, count, top_k, _, _, chosen = LOADS[load]
    logits = torch.randn(tokens, count)
    if chosen:
        logits[:, chosen] += 100.0
    return nk.route(logits, None, top_k)


def setting(load, dtype=torch.float32):
    tokens, count, _, width, hidden, _ = LOADS[load]
    routing = routing_of(load)
    x = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    up = (torch.randn(count, width, hidden) / hidden**0.5).requires_grad_()
    down = (torch.randn(count, hidden, width) / width**0.5).requires_grad_()
    weights = torch.rand(routing.order.numel()).requires_grad_()
    return routing, x, up, down, weights


def decoded(codes, scales, global_scale):
    codes, scales = codes.view(torch.uint8), scales.view(torch.uint8)
    if global_scale is None:
        return E4M3[codes.long()] * torch.exp2(scales.double() - 127).repeat_interleave(32, -1)
    values = E2M1[torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()]
    return values * E4M3[scales.long()].repeat_interleave(16, -1) * global_scale.double()


def rows_of(form):
    if isinstance(form, torch.Tensor):
        return form.double()
    return decoded(form.codes, form.scales, getattr(form, "global_scale", None))


def matrix_of(stack, e):
    if stack.scales is None:
        return stack.values[e].double()
    return decoded(*(None if part is None else part[e] for part in stack[:3]))


def columns_of(form, e, rows):
    """[cols, values of group e]."""
    if not isinstance(form, Columns):
        return form.double()[:, rows]
    width, run = (2, 16) if form.global_scales is not None else (1, 32)
    first, end = form.starts[e : e + 2].tolist()
    scale = None if form.global_scales is None else form.global_scales[e]
    return decoded(form.values[:, first // width : end // width], form.scales[:, first // run : end // run], scale)


def times(a, b):
    """a @ b.T over the values that both have."""
    k = min(a.shape[1], b.shape[1])
    return a[:, :k] @ b[:, :k].t()


def close(got, wanted, bound=2e-6):
    assert got.shape == wanted.shape
    assert (got.double() - wanted).norm() <= bound * wanted.norm()


@pytest.mark.parametrize(
    "load, mix",
    [*itertools.product(LOADS, ["nvfp4"]), *itertools.product(["17 tokens", "odd widths"], list(MIXES)[1:])],
)
def test_against_a_loop_over_experts(load, mix, monkeypatch):
    routing, x, up, down, weights = setting(load)
    sizes, recipe = routing.sizes(), MIXES[mix]
    products = []
    for name in ("grouped_matmul", "grouped_relu2", "grouped_relu2_backward"):
        plain = getattr(module, name)
        noted = lambda a, b, *rest, plain=plain: products.append((a, b)) or plain(a, b, *rest)  # noqa: E731
        monkeypatch.setattr(module, name, noted)
    token = torch.tensor([int(slot) // routing.indices.shape[1] for slot in routing.order], dtype=torch.int64)
    y = experts(x, up, down, routing, weights, (recipe, recipe), (torch.tensor([3, 5]), torch.tensor([4, 0])))
    dy = torch.randn_like(y)
    dx, dup, ddown, dweights = torch.autograd.grad(y, (x, up, down, weights), dy)
    as_stack = lambda w: w if isinstance(w, Stack) else Stack(w)  # noqa: E731
    (x_row, up_row), (a_row, down_row), (dy_row, down_col), (dy_col, a_col), (dh_row, up_col), (dh_col, x_col) = (
        products
    )

    def linear(a, w, width, index=slice(None)):
        parts = [times(rows_of(a)[index][rows], matrix_of(as_stack(w), e))[:, :width] for e, rows in groups_of(sizes)]
        return torch.cat(parts)

    h = linear(x_row, up_row, up.shape[1], token)
    x_col = x_col[:, token] if isinstance(x_col, torch.Tensor) else x_col
    close(y, linear(a_row, down_row, x.shape[1]))
    da = linear(dy_row, down_col, up.shape[1])
    close(dweights, (da * h.relu().square()).sum(1))
    slots = linear(dh_row, up_col, x.shape[1])
    close(dx, torch.stack([slots[row].sum(0) for row in routing.inverse]) if len(x) else dx.double())
    for got, left, right in ((ddown, dy_col, a_col), (dup, dh_col, x_col)):
        wanted = [times(columns_of(left, e, r), columns_of(right, e, r)) for e, r in groups_of(sizes)]
        close(got, torch.stack(wanted)[:, : got.shape[1], : got.shape[2]])
        assert not any(got[e].any() for e, size in enumerate(sizes) if size == 0)
    # and the operands are what the recipe says, of the values that they stand for: 9 % is what four bits leave
    a, dh = h.relu().square() * weights.double()[:, None], 2 * h.relu() * weights.double()[:, None] * da
    tokens = x.double()[token]
    for form, exact in ((x_row, x.double()), (a_row, a), (dy_row, dy.double()), (dh_row, dh)):
        assert (rows_of(form)[:, : exact.shape[1]] - exact).norm() <= 0.2 * exact.norm()
    for form, exact in ((a_col, a), (dy_col, dy.double()), (dh_col, dh), (x_col, tokens)):
        if getattr(form, "hadamard", None) is None:
            parts = [(columns_of(form, e, r)[:, : r.stop - r.start].t() - exact[r]) for e, r in groups_of(sizes)]
            assert torch.cat(parts).norm() <= 0.2 * exact.norm()
        else:
            assert form.hadamard == DEFAULT_SIGNS


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gather_inside_is_the_gather_outside(mix, dtype):
    """One global scale, since every token has a row; and codes are copied. Not so with noise, of which a token draws once."""
    recipe = MIXES[mix]
    if recipe.fprop_x and recipe.fprop_x.stochastic:
        pytest.skip("a token's copies are alike inside alone")
    routing, x, up, down, weights = setting("17 tokens", dtype)
    results = []
    for rows, groups in ((x, routing), (permute(x, routing), routing.offsets)):
        noises = torch.tensor([3, 5]), torch.tensor([4, 0])
        y = experts(rows, up, down, groups, weights, (recipe, recipe), noises)
        dy = torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype)
        results.append([y, *torch.autograd.grad(y, (x, up, down, weights), dy), *noises])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_tokens_copies_share_no_noise_in_the_column_form():
    """Both experts are alike and get the same 32 tokens; with one noise for both their gradients would be equal."""
    routing = nk.route(torch.zeros(32, 2), None, 2)
    x, up, down = (
        torch.randn(32, 16),
        torch.randn(16, 16).repeat(2, 1, 1).requires_grad_(),
        torch.randn(16, 16).repeat(2, 1, 1),
    )
    recipe, dy = LinearRecipe(wgrad_x=QuantSpec("1x16", "stochastic")), torch.randn(32, 16)
    y = experts(x, up, down, routing, None, (recipe, HIGH), (torch.tensor([1, 0]), None))
    (dw,) = torch.autograd.grad(y, up, permute(dy, routing))
    assert not torch.equal(dw[0], dw[1]) and (dw[0] - dw[1]).norm() < 0.2 * dw[0].norm()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mix", ["nvfp4", "mxfp8", "high"])
def test_what_is_saved(mix, frozen):
    """Of each pair of token and expert the hidden values and the codes of wgrad's operands; in high precision nothing but the
    tokens beside the former; the hidden values alone where the weights are frozen."""
    tokens, hidden, width, count, top_k = 256, 64, 32, 4, 4
    recipe = HIGH if mix == "high" else MIXES[mix]
    routing = nk.route(torch.randn(tokens, count), None, top_k)
    x = torch.randn(tokens, hidden).bfloat16().requires_grad_()
    up, down = (torch.randn(count, *shape, requires_grad=not frozen) for shape in ((width, hidden), (hidden, width)))
    forms, kept = [quantize_experts(w, recipe) if recipe.quantized else None for w in (up, down)], []
    noises = torch.tensor([1, 0]), torch.tensor([2, 0])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts(x, up, down, routing, None, (recipe, recipe), noises, forms)
    ours = {t.data_ptr() for t in (*routing.__dict__.values(), up, down, *([] if frozen else [x]))}
    ours |= {t.data_ptr() for pair in forms if pair for t in pair[1][:3] if t is not None}
    new = sum(t.nbytes for t in kept if t.data_ptr() not in ours)
    pairs = tokens * top_k
    bits = {"nvfp4": 4.5, "mxfp8": 8.25, "high": 0}[mix]
    codes = (pairs + 31 * count) * (hidden + width) * bits / 8 + 2 * (8 * (count + 1) + 4 * count)
    assert new <= 2 * pairs * width + (0 if frozen else codes)


def test_compiles_whole():
    block = block_of()
    x = torch.randn(2, 9, 32)
    noise = [b.clone() for b in block.buffers()]

    def step(call):
        for b, before in zip(block.buffers(), noise, strict=True):
            b.copy_(before)
        block.zero_grad()
        y, balance = call(x)
        (y.square().mean() + balance.loss).backward()
        return [y, *(p.grad.clone() for p in block.parameters())]

    eager = step(block)
    compiled = step(torch.compile(block, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def block_of():
    block = MoE(32, 6, 2, 48, None)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(std=0.2)
    block.experts.recipes = {"up_proj": NVFP4, "down_proj": NVFP4}
    return block


def test_run_to_run():
    routing, x, up, down, weights = setting("17 tokens", torch.bfloat16)
    results = []
    for _ in range(2):
        noises = torch.tensor([3, 5]), torch.tensor([4, 0])
        y = unpermute(experts(x, up, down, routing, weights, (NVFP4, NVFP4), noises), routing)
        results.append([y, *torch.autograd.grad(y.float().square().mean(), (x, up, down, weights))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
