"""Two values in one register, and what an approximation may be off by."""

import itertools

import numpy as np
import pytest

from tests.machine.kernels import elementwise, kernel, launch
from tests.machine.memory import Fault

HALVES = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234]
PAIRS = np.array([low | high << 16 for low, high in itertools.product(HALVES, HALVES)], np.uint32)
A, B = (x.ravel() for x in np.meshgrid(PAIRS, PAIRS))
# bf16: 0, -0, 1, -2, an infinity, NaN, a subnormal number
BF16 = dict(
    zip([0x0000, 0x8000, 0x3F80, 0xC000, 0x7F80, 0x7FC0, 0x0001], [0, 0, 1, -2, np.inf, np.nan, 9.2e-41], strict=True)
)


def signed(x):
    return (x ^ 0x8000) - 0x8000


@pytest.mark.parametrize(
    "name, of_two",
    [
        ("add.s16x2", lambda a, b: a + b),
        ("sub.u16x2", lambda a, b: a - b),
        ("min.s16x2", lambda a, b: min(signed(a), signed(b))),
        ("max.u16x2", max),
        ("max.relu.s16x2", lambda a, b: max(signed(a), signed(b), 0)),
    ],
)
def test_halves_know_nothing_of_each_other(name, of_two):
    got = elementwise(f"{name} d, a, b;", np.uint32, A, B)
    for a, b, d in zip(A.tolist(), B.tolist(), got.tolist(), strict=True):
        assert d == (of_two(a & 0xFFFF, b & 0xFFFF) & 0xFFFF) | (of_two(a >> 16, b >> 16) & 0xFFFF) << 16


@pytest.mark.parametrize("how, holds", [("lt", lambda a, b: a < b), ("geu", lambda a, b: not a < b)])
def test_a_comparison_of_halves_gives_two_predicates(how, holds):
    words = [low | high << 16 for low, high in itertools.product(BF16, BF16)]
    a, b = (np.array(x, np.uint32) for x in zip(*itertools.product(words, words), strict=True))
    body = f"setp.{how}.bf16x2 %p1|%p2, a, b;\nselp.u32 d, 1, 0, %p1;\n@%p2 or.b32 d, d, 2;"
    got = elementwise(body, np.uint32, a, b)
    for x, y, d in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        low, high = (holds(BF16[x >> at & 0xFFFF], BF16[y >> at & 0xFFFF]) for at in (0, 16))
        assert d == low + 2 * high


def test_pairs_of_fp32():
    rng = np.random.default_rng(1)
    a, b, c = (rng.normal(size=(40, 2)).astype(np.float32) for _ in range(3))
    words = [x.view(np.uint64)[:, 0] for x in (a, b, c)]
    for name, want in (("add.rn.f32x2", a + b), ("mul.rn.f32x2", a * b)):
        got = elementwise(f"{name} d, a, b;", np.uint64, *words[:2], arch="100a")
        assert (got.view(np.float32).reshape(-1, 2) == want).all()
    got = elementwise("fma.rn.f32x2 d, a, b, c;", np.uint64, *words, arch="100a").view(np.float32).reshape(-1, 2)
    exact = a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)
    assert (got == exact.astype(np.float32)).all()


@pytest.mark.parametrize("name", ["div.full.f32", "div.approx.f32", "div.rn.f32"])
def test_an_approximation_is_off_and_not_far(name):
    rng = np.random.default_rng(2)
    a, b = (np.exp(rng.normal(size=2000) * 3).astype(np.float32) for _ in range(2))
    got = elementwise(f"{name} d, a, b;", np.uint32, a.view(np.uint32), b.view(np.uint32)).astype(np.int64)
    off = got - (a / b).view(np.uint32)
    assert (off == 0).all() if name == "div.rn.f32" else abs(off).max() == 1 and 500 < (off != 0).sum() < 1500


def test_exact_quotients_stay_exact():
    a, b = np.float32([6, 1, 0, 1, 3]), np.float32([2, 0.25, 5, 0, 1.5])
    got = elementwise("div.full.f32 d, a, b;", np.uint32, a.view(np.uint32), b.view(np.uint32))
    assert got.view(np.float32).tolist() == [3, 4, 0, np.inf, 2]


def test_nan_to_an_integer_is_zero_or_its_highest_bit():
    """PTX ISA, cvt."""
    nan = np.uint32([0x7FC00000, 0xFFC00000])
    assert elementwise("cvt.rzi.s32.f32 d, a;", np.uint32, nan).tolist() == [0, 0]
    assert elementwise("cvt.rzi.s64.f32 d, a;", np.uint64, nan).tolist() == [1 << 63, 1 << 63]


@pytest.mark.parametrize("name", ["add.sat.s16x2", "max.xorsign.abs.f32", "setp.lt.f32x2", "fma.rn.relu.bf16x2"])
def test_what_is_not_modelled_says_so(name):
    with pytest.raises(Fault):
        launch(kernel(f"{name} %r3, %r1, %r2" + (", %r2;" if name.startswith("fma") else ";")), np.zeros(1, np.uint32))
