"""quantize over groups and stacks on a GPU: the CPU's bytes, in a graph whose loads change, without waiting for the host."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.formats.spec import DEFAULT_SIGNS, QuantSpec
from tests.ops.quantize_checks import same_bytes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SR, NEAREST = QuantSpec(rounding="stochastic"), QuantSpec()
TURNED, TURNED_SR = QuantSpec(hadamard=DEFAULT_SIGNS), QuantSpec(rounding="stochastic", hadamard=DEFAULT_SIGNS)
NOISE = torch.tensor([11, 5])


def parts(form):
    if isinstance(form, torch.Tensor):
        return [form]
    return [form.codes, form.scales, form.global_scale] if hasattr(form, "codes") else list(form[:3])


def assert_same(found, wanted):
    torch.cuda.synchronize()
    for mine, theirs in zip(found, wanted, strict=True):
        for a, b in zip(parts(mine), parts(theirs), strict=True):
            assert same_bytes(a.cpu(), b)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("row, col", [(NEAREST, TURNED), (SR, TURNED_SR), (None, NEAREST)])
def test_groups_in_a_graph(backend, row, col):
    """300 experts of 0 to 900 rows, 1000 columns: more groups than a block has threads, no multiple of a tile."""
    loads = []
    for _ in range(3):
        sizes = torch.randint(0, 60, (300,))
        sizes[7] += 900
        loads.append(torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]))
    rows = max(int(load[-1]) for load in loads)
    for load in loads:
        load[-1] = rows
    x, offsets = torch.randn(rows, 1000).bfloat16(), loads[0].cuda()
    there, noise = x.cuda(), NOISE.cuda()
    with nk.backend(backend):
        nk.quantize_groups(there, offsets, row, col, noise)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            nk.quantize_groups(there, offsets, row, col, noise)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = nk.quantize_groups(there, offsets, row, col, noise)
    for load in loads:
        offsets.copy_(load)
        graph.replay()
        assert_same(found, nk.quantize_groups(x, load, row, col, NOISE))


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("row, col", [(QuantSpec("16x16"), QuantSpec("16x16")), (SR, TURNED_SR)])
def test_stacks(backend, row, col):
    w = torch.randn(9, 200, 144).bfloat16()
    for x in (w, w.mT):
        with nk.backend(backend):
            found = nk.quantize_stack(x.cuda(), row, col, NOISE.cuda())
        assert_same(found, nk.quantize_stack(x, row, col, NOISE))


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_wrong_offsets_reach_nothing_outside(backend):
    x = torch.randn(96, 64, device="cuda").bfloat16()
    for wrong in ([0, 90, 10, 96], [-5, 40, 200], [96, 0, 96], [1 << 40, (1 << 40) + 96, 96]):
        with nk.backend(backend):
            nk.quantize_groups(x, torch.tensor(wrong, device="cuda"), NEAREST, TURNED)
    torch.cuda.synchronize()
    assert torch.isfinite(x).all()
