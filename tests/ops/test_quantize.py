"""The reference quantizer against golden bytes and brute force; what all backends share is in test_native_quantize."""

from pathlib import Path

import numpy as np
import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.formats import e2m1, philox
from nvfp4_kernels.formats.spec import DEFAULT_SIGNS
from nvfp4_kernels.ops.quantize import _cuda
from tests.drawing import given, settings, st
from tests.oracles import nvfp4_brute as brute

GOLDEN = np.load(Path(__file__).parent.parent / "data" / "nvfp4_golden.npz")
NAMES = sorted({key.split("/")[0] for key in GOLDEN.files})
VARIANTS = {
    "1d": (nk.QuantSpec(), nk.QuantSpec()),
    "2d": (nk.QuantSpec("16x16"), nk.QuantSpec("16x16")),
    "rht": (nk.QuantSpec(), nk.QuantSpec(hadamard=DEFAULT_SIGNS)),
    "4over6_mae": (nk.QuantSpec(four_over_six="mae"),) * 2,
    "4over6_mse_2d": (nk.QuantSpec("16x16", four_over_six="mse"),) * 2,
}
BACKENDS = ("reference", "native")


def golden_input(name):
    return torch.from_numpy(GOLDEN[f"{name}/x_bf16_bits"].view(np.int16)).view(torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NAMES)
def test_golden_bytes(name, variant, backend):
    with nk.backend(backend):
        forms = nk.quantize_pair(golden_input(name), *VARIANTS[variant])
    for form, suffix in zip(forms, ("", "_t"), strict=True):
        key = f"{name}/{variant}"
        np.testing.assert_array_equal(form.codes.numpy(), GOLDEN[f"{key}/codes{suffix}"])
        np.testing.assert_array_equal(form.scales.view(torch.uint8).numpy(), GOLDEN[f"{key}/scales{suffix}"])
        amax = GOLDEN[f"{key}/amax{suffix}"][0]
        largest = np.float32(256 * 6 if "4over6" in variant else 448 * 6)
        encode = np.float32(1) if amax == 0 else min(largest / amax, np.finfo(np.float32).max)
        assert form.global_scale.item() == np.float32(1) / np.float32(encode)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e38, 1e-38, 1e-42])
def test_reference_equals_brute_force(rounding, scale):
    x = (torch.randn(5, 48) * scale).clamp(-3e38, 3e38)
    x[0, :16] = 0
    x[1, 3] = -0.0
    noise = torch.tensor([0x1234_5678_9ABC_DEF0, 7 << 33 | 5])
    with nk.backend("reference"):
        q = nk.quantize(x, rounding=rounding, seed=noise)
    codes, scales, global_scale = brute.quantize_1x16(
        x.numpy(), None if rounding == "nearest" else tuple(noise.tolist())
    )
    np.testing.assert_array_equal(e2m1.unpack(q.codes).numpy(), codes)
    np.testing.assert_array_equal(q.scales.view(torch.uint8).numpy(), scales)
    assert q.global_scale.item() == global_scale


@pytest.mark.parametrize("amax", [0.0, 1e-42, 0.3, 9.0, 3e38])
def test_given_amax(amax):
    x = torch.randn(3, 32)
    with nk.backend("reference"):
        q = nk.quantize(x, amax=torch.tensor(amax))
        most = nk.quantize(1e4 * x, four_over_six="mae", amax=torch.tensor(amax)).dequantize().abs().max().double()
    codes, scales, global_scale = brute.quantize_1x16(x.numpy(), amax=amax)
    np.testing.assert_array_equal(e2m1.unpack(q.codes).numpy(), codes)
    np.testing.assert_array_equal(q.scales.view(torch.uint8).numpy(), scales)
    assert q.global_scale.item() == global_scale
    assert most <= 1.75 * amax * (1 + 1e-6) or amax in (0.0, 1e-42)
    assert amax != 0.3 or most >= 1.75 * amax * (1 - 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_given_amax_of_the_transform(backend):
    """Of rows, of columns and of both; of one form alone and of the pair."""
    spec, x, amax = nk.QuantSpec(hadamard=DEFAULT_SIGNS), torch.randn(32, 48), torch.tensor([3.0, 0.5, 2.0])
    with nk.backend(backend):
        turned = [nk.hadamard(side).float().numpy() for side in (x, x.t())]
        pair = nk.quantize_pair(x, spec, spec, amax=amax)
        alone = nk.quantize(x, spec, amax=amax[:2]), nk.quantize(x, spec, transpose=True, amax=amax[::2])
    for values, most, *forms in zip(turned, (0.5, 2.0), pair, alone, strict=True):
        codes, scales, global_scale = brute.quantize_1x16(values, amax=most)
        for form in forms:
            np.testing.assert_array_equal(e2m1.unpack(form.codes).numpy(), codes)
            np.testing.assert_array_equal(form.scales.view(torch.uint8).numpy(), scales)
            assert form.global_scale.item() == global_scale


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=16, max_size=16))
@settings(max_examples=60, deadline=None)
def test_reference_equals_brute_force_on_any_floats(values):
    x = torch.tensor([values], dtype=torch.float32)
    with nk.backend("reference"):
        q = nk.quantize(x)
    codes, scales, global_scale = brute.quantize_1x16(x.numpy())
    np.testing.assert_array_equal(e2m1.unpack(q.codes).numpy(), codes)
    np.testing.assert_array_equal(q.scales.view(torch.uint8).numpy(), scales)
    assert q.global_scale.item() == global_scale
    assert torch.isfinite(q.dequantize()).all()


def test_philox_known_answers():
    """Vectors of the Random123 distribution for philox4x32-10."""
    word = torch.tensor
    known = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, answer in known:
        drawn = philox.philox4x32(tuple(map(word, counter)), tuple(map(word, key)))
        assert [int(x) for x in drawn] == answer
        assert brute.philox(counter, key) == answer


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_mean_is_the_value(backend):
    """4,096 draws average to the value within 4 standard errors, after the 8-bit rule's own known bias (at most 1/256 step)."""
    values = torch.tensor([6.0, 0.1, 0.3, 0.7, 1.3, 1.9, 2.2, 2.9, 3.3, 3.9, 4.1, 5.0, 5.9, -0.6, -2.5, -4.9])
    x = values.repeat(4096, 1)  # the first value makes every scale a power of two: codes are the values themselves
    x[:, 0] = 6.0
    with nk.backend(backend):
        q = nk.quantize(x, rounding="stochastic", seed=3)
    decoded = q.dequantize().double()
    unit = q.scales[0, 0].double() * q.global_scale.double()
    grid = torch.tensor(brute.GRID, dtype=torch.float64) * unit
    for j, value in enumerate(values.double()):
        magnitude = value.abs()
        low = grid[grid <= magnitude * (1 + 1e-7)].max()
        above = grid[grid > low]
        step = above.min() - low if len(above) else torch.tensor(1.0)
        share = torch.floor((magnitude - low) / step * 256 + 1e-4) / 256
        expected = (low + share * step) * value.sign()
        deviation = step * (share * (1 - share)).clamp(min=0).sqrt() / 4096**0.5
        assert (decoded[:, j].mean() - expected).abs() <= 4 * deviation + 1e-6, j
        assert (expected - value).abs() <= step / 256 * 1.001, j


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_values_never_move(backend):
    x = torch.tensor([brute.GRID * 2]) * torch.tensor([1.0] * 8 + [-1.0] * 8)
    with nk.backend(backend):
        for seed in range(8):
            assert torch.equal(nk.quantize(x, rounding="stochastic", seed=seed).codes, nk.quantize(x).codes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_makes_all_nan(backend, bad):
    x = torch.randn(17, 40)
    x[3, 5] = bad
    with nk.backend(backend):
        row, col = nk.quantize_pair(x, nk.QuantSpec(), nk.QuantSpec(hadamard=DEFAULT_SIGNS))
        assert row.dequantize().isnan().all() and col.dequantize().isnan().all()
        assert nk.matmul(row, nk.quantize(torch.randn(8, 40))).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tile_scales_serve_both_orientations(backend):
    x = torch.randn(37, 50)
    with nk.backend(backend):
        row, col = nk.quantize_pair(x, nk.QuantSpec("16x16"), nk.QuantSpec("16x16"))
        assert torch.equal(row.dequantize(), col.dequantize().t())


@pytest.mark.parametrize("backend", BACKENDS)
def test_pair_is_its_parts(backend):
    x = torch.randn(33, 50, dtype=torch.bfloat16)
    row_spec, col_spec = nk.QuantSpec("1x16", "stochastic"), nk.QuantSpec("1x16", "stochastic", DEFAULT_SIGNS)
    noise = torch.tensor([5, 11])
    with nk.backend(backend):
        row, col = nk.quantize_pair(x, row_spec, col_spec, noise)
        alone = (
            nk.quantize(x, row_spec, seed=noise),
            nk.quantize(x, col_spec, transpose=True, seed=noise + torch.tensor([0, 1])),
        )
        for one, other in zip((row, col), alone, strict=True):
            assert torch.equal(one.codes, other.codes) and torch.equal(
                one.scales.view(torch.uint8), other.scales.view(torch.uint8)
            )
        turned = nk.quantize(x.t().contiguous(), col_spec, seed=noise + torch.tensor([0, 1]))
        assert torch.equal(turned.codes, col.codes) and turned.shape == col.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_mxfp8(backend, scale):
    """Every value within half an E4M3 step of its block's power of two; nothing saturates, no smaller scale would do."""
    x = torch.randn(9, 70) * scale
    x[2, :32] = 0
    with nk.backend(backend):
        q = nk.quantize(x, block="1x32")
    assert q.codes.shape == (9, 96) and q.scales.shape == (9, 3)
    decoded = q.dequantize()
    exponent = q.scales.double() - 127
    unit = torch.exp2(exponent).repeat_interleave(32, 1)[:, :70]
    amax = torch.nn.functional.pad(x, (0, 26)).view(9, 3, 32).abs().amax(-1).double()
    assert (amax <= 448 * torch.exp2(exponent)).all()
    assert ((amax > 448 * torch.exp2(exponent - 1)) | (amax == 0)).all()
    spacing = torch.exp2(torch.floor(torch.log2((x.double().abs() / unit).clamp(min=2**-6)))) / 8
    assert ((decoded.double() - x.double()).abs() <= spacing / 2 * unit).all()


def test_options_give_the_specified_shapes():
    x = torch.randn(3, 5, 40)
    q = nk.quantize(x)
    assert q.codes.shape == (3, 5, 24) and q.scales.shape == (3, 5, 3) and q.shape == x.shape
    assert q.dequantize().shape == x.shape
    assert nk.quantize(x[0], transpose=True).shape == (40, 5)
    assert nk.quantize(torch.randn(0, 32)).dequantize().shape == (0, 32)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: nk.quantize([1.0]), TypeError, "x: got list; allowed: a torch.Tensor"),
        (lambda: nk.quantize(torch.ones(2, 16, dtype=torch.int32)), TypeError, "x: got torch.int32; allowed: bfloat16"),
        (lambda: nk.quantize(torch.ones(2, 0)), ValueError, "x: got shape"),
        (lambda: nk.quantize(torch.tensor(1.0)), ValueError, "x: got 0 dimensions"),
        (lambda: nk.quantize(torch.ones(2, 16, 16), block="16x16"), ValueError, "x: got 3 dimensions; allowed: 2"),
        (
            lambda: nk.quantize(torch.ones(2, 16), block="1x8"),
            ValueError,
            "block: got '1x8'; allowed: 1x16, 16x16, 1x32",
        ),
        (lambda: nk.quantize(torch.ones(2, 16), block="16x16", hadamard=1), ValueError, "hadamard: got signs"),
        (lambda: nk.quantize(torch.ones(2, 16), hadamard=[1] * 15), ValueError, "signs: got"),
        (lambda: nk.quantize(torch.ones(2, 16), hadamard=True), TypeError, "signs: got True; allowed: a 16-bit mask"),
        (lambda: nk.QuantSpec(hadamard=True), ValueError, "hadamard: got True"),
        (lambda: nk.quantize(torch.ones(2, 16), "1x16"), TypeError, "spec: got str; allowed: a QuantSpec"),
        (lambda: nk.quantize_pair(torch.ones(2, 16), None, "1x16"), TypeError, "col: got str; allowed: a QuantSpec"),
        (
            lambda: nk.quantize(torch.ones(2, 16), rounding="stochastic", seed=torch.ones(2)),
            TypeError,
            "seed: got torch.float32",
        ),
        (
            lambda: nk.quantize(torch.ones(2, 16, requires_grad=True)),
            RuntimeError,
            "x: got a tensor that requires grad",
        ),
        (lambda: nk.quantize(torch.ones(4, 32), block="1x32", rounding="stochastic"), ValueError, "MXFP8"),
        (lambda: nk.quantize(torch.ones(4, 32), amax=1.0), TypeError, "amax: got float; allowed: a torch.Tensor"),
        (lambda: nk.quantize(torch.ones(4, 32), amax=torch.ones(1).half()), TypeError, "amax: got torch.float16"),
        (
            lambda: nk.quantize_pair(torch.ones(4, 32), *VARIANTS["1d"], amax=torch.ones(2)),
            ValueError,
            r"amax: got shape \[2\]; allowed: 1 in all, one for each global scale, or \[3\], with the transforms'",
        ),
        (
            lambda: nk.quantize(torch.ones(4, 32), amax=torch.ones((), device="meta")),
            ValueError,
            "amax: got device meta",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("spec", ["1x16", "16x16:stochastic", "1x16:nearest:hadamard=d7e8:four_over_six=mae", "1x32"])
def test_spec_text_round_trip(spec):
    parsed = nk.QuantSpec.parse(spec)
    assert nk.QuantSpec.parse(str(parsed)) == parsed


def test_opcheck():
    x = torch.randn(17, 40)
    noise = torch.tensor([1, 2])
    for row, col in (
        ("1x16:nearest", ""),
        ("1x16:stochastic", "1x16:stochastic:hadamard=d7e8"),
        ("", "16x16:nearest"),
        ("1x32:nearest",) * 2,
    ):
        amax = torch.ones(3, 1) if "hadamard" in col else None
        torch.library.opcheck(torch.ops.nvfp4.quantize.default, (x, row, col, noise, None, None, None, amax))


def test_a_given_amax_compiles():
    x, amax = torch.randn(17, 40), torch.tensor(2.0)
    run = lambda x, amax: nk.quantize_pair(x, *VARIANTS["rht"], amax=amax)  # noqa: E731
    for made, plain in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(x, amax), run(x, amax), strict=True):
        assert torch.equal(made.codes, plain.codes) and torch.equal(made.global_scale, plain.global_scale)


def test_a_stack_of_more_matrices_than_a_grid_has_is_refused(monkeypatch):
    """The CUDA kernels' launch would fail; Triton takes the matrices one by one."""
    monkeypatch.setattr(_cuda._cuda, "refuses_device", lambda op, x: None)
    found = [_cuda.refuses(torch.empty(n, 1, 16, device="meta"), nk.QuantSpec("1x16"), None) for n in (65535, 65536)]
    assert found == [None, "a stack of more than 65535 matrices"]
