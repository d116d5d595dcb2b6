"""route against choices made by sorting Python lists."""

import math

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops.route.op import route


def oracle(logits, bias, top_k, scale, n_group, topk_group, normalize):
    """For each token {expert: weight}."""
    tokens = []
    for row in logits.tolist():
        scores = [1 / (1 + math.exp(-v)) for v in row]
        choice = [s + b for s, b in zip(scores, bias, strict=True)]
        size = len(row) // n_group
        groups = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(n_group)]
        best = sorted(range(n_group), key=lambda g: -groups[g])[:topk_group]
        allowed = [e for e in range(len(row)) if e // size in best]
        chosen = sorted(allowed, key=lambda e: -choice[e])[:top_k]
        total = sum(scores[e] for e in chosen) + 1e-20 if normalize else 1.0
        tokens.append({e: scores[e] / total * scale for e in chosen})
    return tokens


@pytest.mark.parametrize(
    "top_k, n_group, topk_group", [(1, 1, 1), (3, 1, 1), (8, 1, 1), (3, 4, 2), (2, 2, 1), (4, 8, 4)]
)
@pytest.mark.parametrize("normalize", [True, False])
def test_choice_and_weights(top_k, n_group, topk_group, normalize):
    logits, bias = torch.randn(40, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    routing = route(logits, bias, top_k, 2.5, n_group, topk_group, normalize)
    expected = oracle(logits, bias.tolist(), top_k, 2.5, n_group, topk_group, normalize)
    for token in range(40):
        got = dict(zip(routing.indices[token].tolist(), routing.weights[token].tolist(), strict=True))
        assert got == pytest.approx(expected[token], rel=1e-9)


def test_order_is_by_expert_and_stable(backend):
    logits = torch.randn(33, 6)
    routing = route(logits, None, 2)
    slots = [(int(e), t * 2 + c) for t, row in enumerate(routing.indices) for c, e in enumerate(row)]
    assert routing.order.tolist() == [slot for _, slot in sorted(slots)]
    assert torch.equal(routing.order[routing.inverse.flatten()], torch.arange(66))
    assert routing.sizes() == [sum(e == k for e, _ in slots) for k in range(6)]
    assert routing.offsets.tolist() == [sum(e < k for e, _ in slots) for k in range(7)]


def test_the_bias_sways_the_choice_and_never_the_weights(backend):
    logits = torch.zeros(4, 5)
    bias = torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0])
    routing = route(logits, bias, 2)
    assert routing.indices.sort(1).values.tolist() == [[2, 4]] * 4
    assert torch.equal(routing.weights, torch.full((4, 2), 0.5))


def test_large_biases_keep_small_differences(backend):
    """Published biases drift to 2^6 with less than 2^-2 between experts: bf16 would lose the choice."""
    routing = route(torch.zeros(1, 4), torch.tensor([64.0, 64.01, 64.02, 64.03]), 2)
    assert sorted(routing.indices[0].tolist()) == [2, 3]


def test_gradcheck_of_the_weights():
    logits = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: route(v, None, 3, 2.5).weights, logits)


CASES = {  # tokens, experts, top_k, n_group, topk_group
    "tiny": (33, 8, 2, 1, 1),
    "nano": (50, 128, 6, 1, 1),
    "super": (40, 512, 22, 1, 1),
    "groups": (60, 64, 5, 8, 3),
    "groups of one": (9, 6, 2, 6, 4),
    "all experts": (5, 17, 17, 1, 1),
    "one token": (1, 20, 3, 4, 2),
    "no tokens": (0, 8, 2, 1, 1),
}


def both(logits, *arguments):
    """The routing and the gradient of the logits, by the native backend and by the reference."""
    results = []
    for name in ("native", "reference"):
        leaf = logits.clone().requires_grad_()
        with nk.backend(name):
            routing = route(leaf, *arguments)
            torch.manual_seed(1)
            (gradient,) = torch.autograd.grad(routing.weights, leaf, torch.randn_like(routing.weights))
        results.append((routing, gradient))
    return results


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_against_the_loop_and_the_reference(isa, case, normalize, dtype):
    tokens, experts, top_k, n_group, topk_group = CASES[case]
    logits, bias = 3 * torch.randn(tokens, experts).to(dtype), torch.randn(experts)
    options = (bias, top_k, 2.5, n_group, topk_group, normalize)
    (got, gradient), (reference, wanted) = both(logits, *options)
    for name in ("indices", "offsets", "inverse", "order"):
        assert torch.equal(getattr(got, name), getattr(reference, name)), name
    torch.testing.assert_close(got.weights, reference.weights, rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=2**-8 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)
    for token, expected in enumerate(oracle(logits.double(), bias.tolist(), *options[1:])):
        chosen = dict(zip(got.indices[token].tolist(), got.weights[token].tolist(), strict=True))
        assert chosen == pytest.approx(expected, rel=1e-5)


def test_native_gradient_against_fp64(isa):
    logits, dweights = torch.randn(20, 40, requires_grad=True), torch.randn(20, 4)
    wide = logits.detach().double().requires_grad_()
    with nk.backend("native"):
        routing = route(logits, None, 4, 2.5)
        (gradient,) = torch.autograd.grad(routing.weights, logits, dweights)
    chosen = torch.sigmoid(wide).gather(1, routing.indices)
    expected = torch.autograd.grad(2.5 * chosen / chosen.sum(1, keepdim=True), wide, dweights.double())[0]
    assert (gradient.double() - expected).norm() <= 1e-6 * expected.norm()
    assert (gradient != 0).sum() <= 80


def test_ties_go_by_index_and_nan_comes_first(backend, isa):
    logits = torch.zeros(3, 40)
    logits[1, [5, 30]], logits[2, [7, 9]] = 1.0, torch.tensor([-math.nan, math.nan])  # of either sign
    routing = route(logits, None, 4)
    assert routing.indices.tolist() == [[0, 1, 2, 3], [5, 30, 0, 1], [7, 9, 0, 1]]
    assert routing.weights[:2].isfinite().all() and routing.weights[2].isnan().all()
    routing = route(logits, None, 3, 1.0, 4, 1)
    assert routing.indices.tolist() == [[0, 1, 2], [5, 0, 1], [7, 9, 0]]


def test_threads_change_nothing(isa):
    logits, before, results = torch.randn(700, 64), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with nk.backend("native"):
                results.append(route(logits, None, 4))
    finally:
        torch.set_num_threads(before)
    for name in ("indices", "weights", "offsets", "inverse", "order"):
        assert all(torch.equal(getattr(results[0], name), getattr(other, name)) for other in results[1:])


def test_no_tokens_in_groups(backend):
    routing = route(torch.randn(0, 8, requires_grad=True), torch.randn(8), 3, n_group=4, topk_group=2)
    assert routing.indices.shape == routing.inverse.shape == (0, 3) and routing.offsets.tolist() == [0] * 9
    routing.weights.sum().backward()


def test_registered_op_is_sound():
    logits = torch.randn(6, 8, requires_grad=True)
    # not test_aot_dispatch_dynamic, which cannot add integers to floats
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.nvfp4.route, (logits, torch.randn(8), 3, 2.5, 2, 1, True), test_utils=checks)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(3), None, 1), "logits: got shape"),
        ((torch.zeros(2, 4), None, 5), "top_k: got 5; allowed: 1 to 4"),
        ((torch.zeros(2, 4), torch.zeros(3), 1), "bias: got shape"),
        ((torch.zeros(2, 4), None, 1, 1.0, 3), "n_group: got 3; allowed: a divisor of 4"),
        ((torch.zeros(2, 4), None, 3, 1.0, 2, 1), "topk_group: got 1"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        route(*arguments)
