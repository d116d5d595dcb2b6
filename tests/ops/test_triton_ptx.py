"""The kernels as a GPU compiles them, inline PTX in place of what the interpreter takes instead: bit for bit the reference.

The instructions are executed by tests/machine, as the PTX ISA words them.
"""

import numpy as np
import pytest
import torch

from nvfp4_kernels.formats.spec import DEFAULT_SIGNS
from nvfp4_kernels.ops import _device, _triton
from nvfp4_kernels.ops._triton import tl
from nvfp4_kernels.ops.matmul._triton_decoded import bf16_decoded

pytestmark = [
    pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed"),
    pytest.mark.skipif(not _triton.INTERPRETED, reason="a GPU runs its own instructions"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def ptx(monkeypatch):
    from nvfp4_kernels.ops import _triton_numerics
    from tests.oracles import ptx

    monkeypatch.setattr(_triton_numerics, "WRITTEN_OUT", False)
    monkeypatch.setattr(_triton.tl, "inline_asm_elementwise", ptx.inline_asm_elementwise)


@pytest.mark.parametrize("converts", [False, True], ids=["integers", "cvt e2m1x2"])
@pytest.mark.parametrize("scale", [1.0, 1e38, 1e-38])
def test_quantize(monkeypatch, converts, scale):
    from tests.ops.quantize_checks import SPECS
    from tests.ops.test_quantize_triton import assert_same

    monkeypatch.setattr(_device, "converts_to_fp4", lambda device: converts)
    x = (torch.randn(17, 48) * torch.exp(torch.randn(17, 48)) * scale).clamp(-3.3e38, 3.3e38)
    x[2, :16], x[3, :3] = 0, torch.tensor([-0.0, 3.3e38 if scale > 1 else 1.0, -scale])
    for row, col in ((SPECS[0], SPECS[3]), (SPECS[4], SPECS[6]), (SPECS[2], SPECS[9])):
        assert_same(x, row, col)
        assert_same(x.bfloat16(), col, row)


def test_hadamard():
    from nvfp4_kernels.ops.hadamard import reference, triton

    for x in (torch.randn(5, 40), torch.randn(5, 40) * 1e-38, torch.full((2, 16), 3.3e38)):
        assert torch.equal(triton.run(x, DEFAULT_SIGNS), reference.run(x, DEFAULT_SIGNS))


@_triton.jit
def decode_kernel(word_ptr, scale_ptr, out_ptr):
    i = tl.arange(0, 128)
    x = bf16_decoded(tl.load(word_ptr + i), tl.load(scale_ptr + i))
    for j in tl.static_range(8):
        tl.store(out_ptr + 8 * i + j, x[j].to(tl.int16, bitcast=True))


def test_bf16_decoding():
    """Every code under every positive scale: 2^-9 of its value, in order, exact in bf16, the subnormal 0.5 included."""
    scales = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for codes in (range(8), range(8, 16)):
        word = sum(code << 4 * j for j, code in enumerate(codes))
        words = torch.full((128,), word - (1 << 32) * (word >> 31), dtype=torch.int32)
        out = torch.empty(128, 8, dtype=torch.int16)
        decode_kernel[(1,)](words, scales, out)
        values = torch.tensor([-x if codes[0] else x for x in grid])
        expected = scales[:127, None] * values / 512
        np.testing.assert_array_equal(out.view(torch.bfloat16)[:127].float().numpy(), expected.numpy())
        assert out.view(torch.bfloat16)[127].isnan().all()


@pytest.mark.parametrize("swapped", [False, True])
def test_the_probe_of_a_chips_rounding_finds_its_order_of_random_bits(monkeypatch, swapped):
    from nvfp4_kernels.testing import rounding_probe
    from tests.machine import conversions

    places = [conversions.RANDOM_BITS[n] for n in ((2, 0, 3, 1) if swapped else range(4))]
    monkeypatch.setattr(conversions, "RANDOM_BITS", places)
    monkeypatch.setattr(_device, "rounds_stochastically", lambda device: True)
    wanted = [
        {"nibble": 3 - n, "weights": {bit: 7 - at for at, bit in enumerate(bits)}} for n, bits in enumerate(places)
    ]
    assert rounding_probe.probe("cpu") == wanted
