"""route against choices made by sorting Python lists."""

import math

import pytest
import torch

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


def test_order_is_by_expert_and_stable():
    logits = torch.randn(33, 6)
    routing = route(logits, None, 2)
    slots = [(int(e), t * 2 + c) for t, row in enumerate(routing.indices) for c, e in enumerate(row)]
    assert routing.order.tolist() == [slot for _, slot in sorted(slots)]
    assert torch.equal(routing.order[routing.inverse.flatten()], torch.arange(66))
    assert routing.sizes() == [sum(e == k for e, _ in slots) for k in range(6)]
    assert routing.offsets.tolist() == [sum(e < k for e, _ in slots) for k in range(7)]


def test_the_bias_sways_the_choice_and_never_the_weights():
    logits = torch.zeros(4, 5)
    bias = torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0])
    routing = route(logits, bias, 2)
    assert routing.indices.sort(1).values.tolist() == [[2, 4]] * 4
    assert torch.equal(routing.weights, torch.full((4, 2), 0.5))


def test_large_biases_keep_small_differences():
    """Published biases drift to 2^6 with less than 2^-2 between experts: bf16 would lose the choice."""
    routing = route(torch.zeros(1, 4), torch.tensor([64.0, 64.01, 64.02, 64.03]), 2)
    assert sorted(routing.indices[0].tolist()) == [2, 3]


def test_gradcheck_of_the_weights():
    logits = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: route(v, None, 3, 2.5).weights, logits)


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
