"""The Triton causal_conv1d against sums written out in float64; in the interpreter where there is no GPU."""

import itertools

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops import _triton
from nvfp4_kernels.ops.causal_conv1d import triton as implementation

pytestmark = pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = [0, 0, 1, 3, 6, 6, 39, 71, 74, 74]  # empty at both ends and inside, shorter than the filter, across spans


@pytest.fixture(autouse=True)
def forced():
    with nk.backend("triton"):
        yield


def one(x, weight, bias, silu, state):
    """y and last state of one sequence, x [length, channels], state [channels, width - 1] or None."""
    width = weight.shape[1]
    past = x.new_zeros(width - 1, x.shape[1]) if state is None else state.t()
    rows = torch.cat([past, x])
    taps = [rows[k : k + len(x)] * weight[:, k] for k in range(width)]
    total = sum(taps) if bias is None else sum(taps) + bias
    return total / (1 + torch.exp(-total)) if silu else total, rows[len(rows) - width + 1 :].t()


def oracle(x, weight, bias, silu, state, bounds):
    flat = x.reshape(-1, x.shape[-1])
    made = [
        one(flat[start:end], weight, bias, silu, None if state is None else state[i])
        for i, (start, end) in enumerate(itertools.pairwise(bounds))
    ]
    return torch.cat([y for y, _ in made]).view(x.shape), torch.stack([last for _, last in made])


def inputs(batch, length, channels, width, sequences, dtype=torch.float32):
    shapes = dict(x=(batch, length, channels), weight=(channels, width), bias=(channels,))
    shapes["state"] = (sequences, channels, width - 1)
    return {name: torch.randn(shape, device=DEVICE).to(dtype) for name, shape in shapes.items()}


def both(given, silu, bounds, cu_seqlens, dy, dstate):
    """(y, state, gradients) by the op and by the oracle in float64."""
    results = []
    for double in (False, True):
        leaves = {n: (t.double() if double else t).detach().requires_grad_() for n, t in given.items() if t is not None}
        x, weight, bias, state = (leaves.get(n) for n in ("x", "weight", "bias", "state"))
        if double:
            made = oracle(x, weight, bias, silu, state, bounds)
        else:
            made = nk.causal_conv1d(x, weight, bias, "silu" if silu else None, state, True, cu_seqlens)
        outputs, grads = (made[:1], (dy,)) if dstate is None else (made, (dy, dstate))
        grads = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
        results.append([*made, *torch.autograd.grad(outputs, list(leaves.values()), grads)])
    return results


def check(results, tolerance=2e-6):
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape
        scale = max(expected.abs().max().item(), 1e-3) if expected.numel() else 1
        torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 5, 35])
@pytest.mark.parametrize("silu, biased, started", [(True, True, True), (False, False, True), (True, False, False)])
def test_rows(width, length, silu, biased, started):
    given = inputs(2, length, 5, width, 2)
    given |= {"bias": given["bias"] if biased else None, "state": given["state"] if started else None}
    dy, dstate = torch.randn(2, length, 5, device=DEVICE), torch.randn(2, 5, width - 1, device=DEVICE)
    bounds = [0, length, 2 * length]
    check(both(given, silu, bounds, None, dy, dstate))


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("started, ended", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed(width, started, ended, index):
    given = inputs(2, 37, 3, width, len(BOUNDS) - 1)
    given["state"] = given["state"] if started else None
    cu_seqlens = torch.tensor(BOUNDS, dtype=index, device=DEVICE)
    dy = torch.randn(2, 37, 3, device=DEVICE)
    dstate = torch.randn(len(BOUNDS) - 1, 3, width - 1, device=DEVICE) if ended else None
    check(both(given, True, BOUNDS, cu_seqlens, dy, dstate))


def test_several_blocks_of_channels_and_strides():
    """Channels beyond one program's block; x, dy and the state as views of wider tensors."""
    channels = implementation.block(torch.empty(0), 1) + 3
    wide = torch.randn(2, 6, channels + 40, device=DEVICE)
    given = inputs(2, 6, channels, 4, 2) | {"x": wide[..., 7 : 7 + channels]}
    given["state"] = torch.randn(3, 2, channels, device=DEVICE).permute(1, 2, 0)
    dy = torch.randn(6, 2, channels, device=DEVICE).transpose(0, 1)
    check(both(given, True, [0, 6, 12], None, dy, torch.randn(2, channels, 3, device=DEVICE)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_once(dtype):
    """One unit in the last place, for Triton's interpreter truncates to bf16."""
    given = inputs(1, 40, 20, 4, 1, dtype)
    given["weight"] = given["weight"].float()
    dy = torch.randn(1, 40, 20, device=DEVICE).to(dtype)
    got, expected = both(given, True, [0, 40], None, dy, torch.randn(1, 20, 3, device=DEVICE).to(dtype))
    unit = torch.finfo(dtype).eps
    for ours, exact in zip(got, expected, strict=True):
        assert ((ours.double() - exact).abs() <= unit * exact.abs() + 2e-6 * exact.abs().max()).all()
    assert got[0].dtype == dtype and got[2].dtype == dtype and got[3].dtype == torch.float32


def test_neighbours_cannot_leak():
    given = inputs(1, 12, 4, 4, 3)
    x, cu_seqlens = given["x"], torch.tensor([0, 5, 9, 12], device=DEVICE)
    dirty = x.clone()
    dirty[:, :5], dirty[:, 9:] = float("nan"), float("nan")
    results = []
    for source in (x, dirty):
        leaf = source.clone().requires_grad_()
        y, last = nk.causal_conv1d(leaf, given["weight"], given["bias"], "silu", None, True, cu_seqlens)
        results.append((y[:, 5:9], last[1], torch.autograd.grad(y[:, 5:9].sum(), leaf)[0][:, 5:9]))
    for clean, neighboured in zip(*results, strict=True):
        assert torch.equal(clean, neighboured) and clean.isfinite().all()


def test_same_bits_on_every_run():
    given = inputs(3, 50, 6, 4, 3)
    dy, dstate = torch.randn(3, 50, 6, device=DEVICE), torch.randn(3, 6, 3, device=DEVICE)
    arguments = (given["x"], given["weight"], given["bias"], given["state"], None, True)
    first, second = (implementation.backward(dy, dstate, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty():
    weight = torch.randn(4, 4, device=DEVICE)
    state = torch.randn(2, 4, 3, device=DEVICE)
    y, last = nk.causal_conv1d(torch.zeros(2, 0, 4, device=DEVICE), weight, initial_state=state, return_state=True)
    assert y.shape == (2, 0, 4) and torch.equal(last, state)


def test_spans_fill_the_machine_and_no_more():
    """One wave of 8 programs an SM at Nano's size, and no span shorter than the seams allow."""
    device = torch.device("cpu")  # 4 multiprocessors
    for tokens, blocks in ((1, 1), (8192, 24), (10**6, 40)):
        span = implementation.backward_span(tokens, blocks, device)
        assert span >= 32 and span % implementation.BACKWARD_TOGETHER == 0
        assert span == 32 or -(-tokens // span) * blocks <= 8 * 4 + blocks


def test_refusal_says_why():
    with pytest.raises(nk.Refused, match="float64"):
        nk.causal_conv1d(torch.zeros(1, 2, 3, dtype=torch.float64), torch.zeros(3, 4))
