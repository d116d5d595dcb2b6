"""Which sums become one instruction with a product, and which the PTX ISA keeps apart: by what a second rounding loses."""

import numpy as np
import pytest

from tests.machine.kernels import elementwise

A = np.float32([1 + 2.0**-12, 3.0, -1 - 2.0**-12])
ONE = np.ones(3, np.float32)
EXACT, ROUNDED = A.astype(np.float64) ** 2, (A * A).astype(np.float64)
SUMS = {
    "neg.f32 b, b; add.f32 d, %r8, b;": lambda square: square - 1,
    "neg.f32 b, b; add.f32 d, b, %r8;": lambda square: square - 1,
    "sub.f32 d, %r8, b;": lambda square: square - 1,
    "sub.f32 d, b, %r8;": lambda square: 1 - square,
}
APART = [  # other rounding, another mode, another product by now, or one by the way that was taken
    "mul.rn.f32 %r8, a, a; sub.f32 d, %r8, b;",
    "mul.f32 %r8, a, a; sub.rn.f32 d, %r8, b;",
    "mul.f32 %r8, a, a; sub.ftz.f32 d, %r8, b;",
    "mul.f32 %r8, a, a; mov.f32 a, b; sub.f32 d, %r8, b;",
    "mul.f32 %r8, a, a; mov.b32 %r8, %r8; sub.f32 d, %r8, b;",
    "setp.gt.f32 %p1, a, b; @%p1 mul.f32 %r8, a, a; @!%p1 mul.f32 %r8, a, a; sub.f32 d, %r8, b;",
    "mul.f32 %r8, a, a; setp.gt.f32 %p1, a, b; @%p1 bra HERE; HERE: sub.f32 d, %r8, b;",
]


@pytest.mark.parametrize("text", SUMS)
def test_a_product_in_a_sum_becomes_one_instruction(text):
    apart, once = (np.float32(SUMS[text](square)) for square in (ROUNDED, EXACT))
    assert (apart != once).any()
    text = f"mul.f32 %r8, a, a; {text}"
    assert (elementwise(text, np.float32, A, ONE) == apart).all()
    assert (elementwise(text, np.float32, A, ONE, contract=True) == once).all()


@pytest.mark.parametrize("text", APART)
def test_what_stays_apart(text):
    assert (elementwise(text, np.float32, A, ONE, contract=True) == np.float32(ROUNDED - 1)).all()
