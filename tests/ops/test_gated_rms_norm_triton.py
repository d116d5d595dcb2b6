"""The Triton gated_rms_norm and its gradients against the formula in float64; in the interpreter where there is no GPU."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops import _triton
from nvfp4_kernels.ops.gated_rms_norm import triton as implementation

pytestmark = pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def forced():
    with nk.backend("triton"):
        yield


def oracle(x, z, weight, eps, group_size, norm_before_gate):
    gate = 1 if z is None else z / (1 + torch.exp(-z))
    u = x if norm_before_gate else x * gate
    groups = u.unflatten(-1, (-1, group_size))
    normed = (groups / (groups.pow(2).mean(-1, keepdim=True) + eps).sqrt()).flatten(-2) * weight
    return normed * gate if norm_before_gate else normed


def compare(x, z, weight, group_size, norm_before_gate, dy, tolerance=2e-6):
    """Output and gradients of the op and the oracle, each relative to its largest value."""
    results = []
    for double in (False, True):
        leaves = [(t.double() if double else t).detach().requires_grad_() for t in (x, z, weight) if t is not None]
        given = leaves if z is not None else [leaves[0], None, leaves[1]]
        call = oracle if double else nk.gated_rms_norm
        y = call(*given, 1e-3, group_size, norm_before_gate)
        results.append([y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))])
    for got, expected in zip(*results, strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape, group_size", [((3, 12), 12), ((2, 3, 12), 4), ((7, 5), 1), ((12,), 6), ((1, 80), 80)])
@pytest.mark.parametrize("gated, norm_before_gate", [(True, False), (True, True), (False, False)])
def test_values_and_gradients(shape, group_size, gated, norm_before_gate):
    x, z, dy = (torch.randn(shape, device=DEVICE) for _ in range(3))
    weight = torch.randn(shape[-1], device=DEVICE)
    cancelled = (
        group_size == 1
    )  # the norm of one value is its sign: the gradient is what rounding leaves of a difference
    compare(x, z if gated else None, weight, group_size, norm_before_gate, dy, 1e-4 if cancelled else 2e-6)


@pytest.mark.parametrize("gated, norm_before_gate", [(True, False), (True, True), (False, False)])
def test_groups_in_pieces(monkeypatch, gated, norm_before_gate):
    """The same with 8 channels a piece: three pieces, the last one short, and more rows than programs."""
    monkeypatch.setattr(implementation, "PIECE", 8)
    monkeypatch.setattr(implementation, "backward_programs", lambda *_: 3)
    x, z, dy = (torch.randn(5, 40, device=DEVICE) for _ in range(3))
    compare(x, z if gated else None, torch.randn(40, device=DEVICE), 20, norm_before_gate, dy)


def test_views_of_wider_tensors():
    wide = torch.randn(4, 3, 50, device=DEVICE)
    dy = torch.randn(3, 4, 12, device=DEVICE).transpose(0, 1)
    compare(wide[..., 3:15], wide[..., 20:32], torch.randn(24, device=DEVICE)[::2], 6, False, dy)
    across = torch.randn(12, 5, device=DEVICE).t()
    compare(across, across.flip(0), torch.randn(12, device=DEVICE), 12, False, torch.ones(5, 12, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_once(dtype):
    """One unit in the last place, for Triton's interpreter truncates to bf16."""
    x, z, dy = (torch.randn(9, 32, device=DEVICE).to(dtype) for _ in range(3))
    compare(x, z, torch.randn(32, device=DEVICE), 16, False, dy, torch.finfo(dtype).eps)
    assert nk.gated_rms_norm(x, z, torch.ones(32, device=DEVICE)).dtype == dtype


def test_same_bits_on_every_run():
    x, z, dy = (torch.randn(40, 24, device=DEVICE) for _ in range(3))
    arguments = (dy, x, z, torch.randn(24, device=DEVICE), 1e-5, 8, False)
    first, second = implementation.backward(*arguments), implementation.backward(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_zeros_and_nothing():
    weight = torch.ones(12, device=DEVICE, requires_grad=True)
    x = torch.zeros(2, 12, device=DEVICE, requires_grad=True)
    y = nk.gated_rms_norm(x, torch.randn(2, 12, device=DEVICE), weight)
    y.sum().backward()
    assert (y == 0).all() and x.grad.isfinite().all() and (weight.grad == 0).all()
    empty = torch.zeros(0, 12, device=DEVICE, requires_grad=True)
    dweight = torch.autograd.grad(nk.gated_rms_norm(empty, None, weight).sum(), weight)[0]
    assert (dweight == 0).all()


def test_tiles():
    """16-byte loads of 16-bit values; pieces cover the group, the last one included; no more programs than rows."""
    for group_size in (1, 512, 4096, 5120, 8192, 32768):
        form = implementation.tile(group_size)
        assert form["BLOCK"] * form["PIECES"] >= group_size > form["BLOCK"] * (form["PIECES"] - 1)
        assert form["BLOCK"] <= 256 or form["BLOCK"] == form["num_warps"] * 256
    assert implementation.backward_programs(1, 8, 2, torch.device("cpu")) == 1
    assert (
        implementation.backward_programs(10**6, 8, 2, torch.device("cpu")) == 4
    )  # 4 SMs * 16 warps over 8 groups of 2


def test_refusals_say_why():
    x = torch.zeros(1, 12)
    with pytest.raises(nk.Refused, match="float64"):
        nk.gated_rms_norm(x.double(), None, torch.ones(12))
    with pytest.raises(nk.Refused, match="group_size 65536 above 32768"):
        nk.gated_rms_norm(torch.zeros(1, 65536, device=DEVICE), None, torch.ones(65536, device=DEVICE))
