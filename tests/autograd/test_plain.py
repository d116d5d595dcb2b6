"""Plain products in fp32 by nk.matmul against fp64, their derivatives to the second, and where torch makes them."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.autograd.plain import product
from nvfp4_kernels.ops.matmul.native import outruns_torch

served = pytest.mark.skipif(not outruns_torch(), reason="torch's is the faster")


def near(found, exact):
    return found.dtype == torch.float32 and (found.double() - exact).norm() < 1e-6 * exact.norm()


@served
@pytest.mark.parametrize("strided", [False, True])
def test_derivatives(strided):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 150, 112), torch.randn(96, 112), torch.randn(96)
    if strided:
        x, weight = x.transpose(0, 1), weight.t().contiguous().t()
    results = []
    for dtype, layer in ((torch.float32, product), (torch.float64, torch.nn.functional.linear)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = layer(*leaves)
        first = torch.autograd.grad((y**3).sum(), leaves, create_graph=True)
        results.append((y, *first, *torch.autograd.grad((first[0] ** 2).sum(), leaves)))
    assert all(near(one, two) for one, two in zip(*results, strict=True))
    y, wanted = product(x, weight.requires_grad_(), None), torch.ones(3, 150, 96)
    (y if not strided else y.transpose(0, 1)).sum().backward()  # its gradient is expanded
    assert near(weight.grad, wanted.double().flatten(0, 1).t() @ x.reshape(-1, 112).double())


@served
def test_served_only_where_it_is_the_same():
    layer, x = nk.Linear(112, 96, bias=True), torch.randn(450, 112)
    given = layer.weight, layer.bias
    assert product(x, *given) is not None
    for other in (x[:9], x.double(), x.to("meta"), x[:, :100]):
        assert product(other, *given) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x, *given) is None and layer(x).dtype == torch.bfloat16
    with nk.backend("reference"):
        assert product(x, *given) is None
    with torch.no_grad():
        exact = layer(x).double()
        assert near(torch.func.vmap(layer)(x[None])[0], exact)
        assert near(torch.compile(layer, backend="eager", fullgraph=True)(x), exact)
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, x))
        assert near(torch.autograd.forward_ad.unpack_dual(dual).tangent, exact - layer.bias.double())
