"""What the tests of every quantizer share: specs, golden bytes, hard inputs, the comparison with the reference bit for bit."""

import contextlib
import tempfile

import numpy as np
import torch

from nvfp4_kernels.formats.spec import DEFAULT_SIGNS, QuantSpec
from nvfp4_kernels.ops.hadamard import reference as hadamard
from nvfp4_kernels.ops.quantize import reference
from tests.ops.test_quantize import GOLDEN, VARIANTS, golden_input

SR = "stochastic"
SPECS = (
    QuantSpec(),
    QuantSpec("16x16"),
    QuantSpec("1x32"),
    QuantSpec(hadamard=DEFAULT_SIGNS),
    QuantSpec("1x16", SR),
    QuantSpec("16x16", SR),
    QuantSpec("1x16", SR, 0x1234),
    QuantSpec(four_over_six="mae"),
    QuantSpec("16x16", four_over_six="mse"),
    QuantSpec("1x16", SR, DEFAULT_SIGNS, "mse"),
)
NOISE = torch.tensor([-0x1234_5678_9ABC, (7 << 33) - 1])
EXTREMES = ("zeros", "1e38", "1e-38", "nan", "inf", "-inf", "one outlier")


def same_bytes(a, b):
    flat = [x.contiguous().flatten().view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def assert_reference(forms, x, row, col, amax=None):
    """forms: what a backend's run(x, row, col, NOISE, None, amax) gave."""
    for part, (a, b) in enumerate(zip(forms, reference.run(x, row, col, NOISE, None, amax), strict=True)):
        assert same_bytes(a, b), (
            f"part {part} of {row} / {col}, x {list(x.shape)} {x.dtype} strides {x.stride()} {amax}"
        )


def true_amaxes(x, row, col):
    """Of the values; and with the transforms'."""
    forms = [(x, row), (x.t(), col)]
    turned = [
        hadamard.run(form, spec.hadamard) for form, spec in forms if spec is not None and spec.hadamard is not None
    ]
    values = x.float().abs().max().view(1, 1)
    most = [form.float().abs().max().view(1, 1) for form in turned]
    if len(most) == 1:  # the other form has nothing to say
        most.insert(0 if col is not None and col.hadamard is not None else 1, torch.full((1, 1), torch.nan))
    return [values, torch.cat((values, *most))] if most else [values]


def to_hand_in(x):
    """Amaxes of x that somebody may hand in: less than the true one, more, none, and what is no number; of the values or with
    bf16 ones of the transforms."""
    most, nan = float(x.float().abs().max()), float("nan")
    low, high = torch.tensor([most / 3, 2 * most]).bfloat16().tolist()
    amaxes = (
        [most * 0.2],
        [most * 3],
        [0.0],
        [most / 2, -low, high],
        [nan, low, nan],
        [most, high, low],
        [float("inf")],
        [-nan],
    )
    return [torch.tensor(amax)[:, None] for amax in amaxes]


def assert_golden(run, name, variant):
    """run(x, row, col, None), as a backend's, on the golden input of this name."""
    forms = run(golden_input(name), *VARIANTS[variant], None)
    for i, suffix in enumerate(("", "_t")):
        key = f"{name}/{variant}"
        np.testing.assert_array_equal(forms[3 * i].numpy(), GOLDEN[f"{key}/codes{suffix}"])
        np.testing.assert_array_equal(forms[3 * i + 1].view(torch.uint8).numpy(), GOLDEN[f"{key}/scales{suffix}"])


def extreme(kind):
    """fp32 [20, 48] of one of EXTREMES."""
    x = torch.randn(20, 48)
    match kind:
        case "zeros":
            x.zero_()
            x[3, 5] = -0.0
        case "1e38" | "1e-38":
            x = (x * float(kind)).clamp(-3.3e38, 3.3e38)
            x[3] = x[3].sign() * 3.3e38 if kind == "1e38" else x[3]
        case "nan" | "inf" | "-inf":
            x[17, 39] = float(kind)
        case "one outlier":
            x[2, 3] = 3e4
    return x


@contextlib.contextmanager
def far_apart(x):
    """x [40, cols] in memory that is reserved and not there: the last rows lie beyond 2^31 elements."""
    stride = (1 << 27) - 64
    with tempfile.NamedTemporaryFile() as file:
        memory = np.memmap(file.name, np.int16, "w+", shape=(len(x) * stride,))
        yield torch.from_numpy(memory).view(x.dtype).as_strided(x.shape, (stride, 1)).copy_(x)


def saturating():
    """fp32 [4, 32] whose transform exceeds bf16's range: infinities in a kernel, BF16_MAX in the contract."""
    x = torch.full((4, 32), 3e38)
    x[1] = -x[1]
    x[2, ::3] *= -1e-3
    return x
