"""Sampling against definitions written out a second time, and against what a distribution is: frequencies."""

import math

import pytest
import torch

from nvfp4_kernels.generate.sample import ACCEPT, TOKEN, Draws, Sampling, Shaper, draw

M32 = 0xFFFFFFFF


def by_definition(logits, s, seen=()):
    """Probabilities of one row, in plain Python and float64."""
    z = [x / s.repetition_penalty if x > 0 else x * s.repetition_penalty for x in logits]
    z = [changed if token in seen else x for token, (changed, x) in enumerate(zip(z, logits, strict=True))]
    if s.temperature == 0:
        return [float(token == z.index(max(z))) for token in range(len(z))]
    z = [x / s.temperature for x in z]
    ranked = sorted(range(len(z)), key=lambda token: -z[token])
    kept = ranked[: s.top_k or len(z)]
    p = {token: math.exp(z[token] - z[ranked[0]]) for token in kept}
    total, nucleus, mass = sum(p.values()), [], 0.0
    for token in kept:
        if mass >= s.top_p:
            break
        nucleus.append(token)
        mass += p[token] / total
    nucleus = [token for token in nucleus if p[token] >= s.min_p * p[ranked[0]]]
    total = sum(p[token] for token in nucleus)
    return [p[token] / total if token in nucleus else 0.0 for token in range(len(z))]


SAMPLINGS = [
    Sampling(1.0), Sampling(0.0), Sampling(0.5), Sampling(2.0, top_k=5), Sampling(1.0, top_p=0.6), Sampling(1.0, min_p=0.2),
    Sampling(0.7, 9, 0.8, 0.05, 1.3), Sampling(1.0, top_k=1), Sampling(0.0, repetition_penalty=4.0), Sampling(1.0, 100, 0.99),
]  # fmt: skip


@pytest.mark.parametrize("groups", [[s] for s in SAMPLINGS] + [SAMPLINGS], ids=str)
def test_probabilities_are_their_definition(groups):
    """Alone, and beside rows that ask for everything else."""
    logits = torch.randn(len(groups), 30) * 2
    seen = torch.rand(len(groups), 30) < 0.4
    got = Shaper.of(groups).probabilities(logits, seen)
    for row, s in enumerate(groups):
        tokens = set(seen[row].nonzero()[:, 0].tolist())
        want = torch.tensor(by_definition(logits[row].double().tolist(), s, tokens))
        torch.testing.assert_close(got[row].double(), want.double(), atol=1e-5, rtol=1e-4)


def test_draws_follow_the_probabilities():
    p = torch.tensor([[0.1, 0.0, 0.4, 0.3, 0.2, 0.0]])
    draws = Draws(3)
    drawn = torch.tensor([draw(p, [draws.at(position, TOKEN)])[0] for position in range(4000)]).bincount(minlength=6)
    assert drawn[1] == drawn[5] == 0
    assert ((drawn / 4000 - p[0]).abs() < 4 * (p[0] * (1 - p[0]) / 4000).sqrt() + 1e-9).all()
    assert draw(p, [1 - 2.0**-33]) == [4] and draw(p, [2.0**-33]) == [0]
    assert draw(torch.eye(3), [0.5] * 3) == [0, 1, 2]


def philox_by_hand(counter, key):
    """One draw of Philox4x32-10 in Python's integers."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & M32, (a >> 32) ^ c[3] ^ k1, a & M32]
        k0, k1 = (k0 + 0x9E3779B9) & M32, (k1 + 0xBB67AE85) & M32
    return c


@pytest.mark.parametrize("seed", [0, 1, (1 << 40) + 5])
def test_draws_are_philox_of_seed_and_position(seed):
    draws = Draws(seed)
    for position in (5000, 0, 127, 128, 1, 5000):  # in any order
        words = philox_by_hand((position, 0, 0, 0), (seed & M32, seed >> 32))
        for word in (TOKEN, ACCEPT):
            assert draws.at(position, word) == (words[word] + 0.5) / 2**32


@pytest.mark.parametrize("name, value", [
    ("temperature", -0.1), ("temperature", math.inf), ("temperature", math.nan), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.1),
    ("min_p", -0.1), ("min_p", 1.5), ("repetition_penalty", 0.0), ("seed", -1), ("seed", 1 << 63),
    ("seed", None), ("seed", 1.5), ("top_k", 1.5), ("temperature", None),
])  # fmt: skip
def test_errors_name_the_argument(name, value):
    with pytest.raises((TypeError, ValueError), match=f"{name}: got {value}"):
        Sampling(**{name: value})


def test_top_k_takes_the_first_of_equals_whatever_the_neighbours_take():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    for other in (1, 3, 6):
        p = Shaper.of([Sampling(1.0, top_k=3), Sampling(1.0, top_k=other)]).probabilities(logits)
        assert (p[0] > 0).tolist() == [False, True, True, True, False, False]
        assert int((p[1] > 0).sum()) == other


def test_a_temperature_next_to_nothing_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for least in (1e-39, 1e-60):
        assert Shaper.of([Sampling(least)]).probabilities(logits).tolist() == [[0, 1, 0]]
        assert Shaper.of([Sampling(1.0, top_p=least)]).probabilities(logits).tolist() == [[0, 1, 0]]


def test_a_penalty_beyond_fp32_is_a_number():
    logits, seen = torch.tensor([[0.0, 3.0, -2.0, 1.0]]), torch.tensor([[True, True, True, False]])
    for penalty, likeliest in ((1e50, 3), (1e-50, 1)):
        p = Shaper.of([Sampling(1.0, repetition_penalty=penalty)]).probabilities(logits, seen)
        assert p.argmax() == likeliest and float(p.sum()) == pytest.approx(1.0)
