"""Plain products by nk.matmul against fp64, their derivatives to the second, and where torch makes them."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.autograd.plain import product
from nvfp4_kernels.nn.attention import attend
from nvfp4_kernels.ops import _device
from nvfp4_kernels.ops.matmul.native import outruns_torch

HALVES = torch.bfloat16, torch.float16
WITHOUT_INSTRUCTIONS = "nvfp4_kernels.ops._device.slow_in_16_bits", "nvfp4_kernels.nn.attention.slow_in_16_bits"


@pytest.fixture(params=[torch.float32, *HALVES], ids=lambda dtype: str(dtype)[6:])
def dtype(request, monkeypatch):
    """A dtype whose products are ours here; in 16 bits this machine is taken for one on which torch is slow."""
    for name in WITHOUT_INSTRUCTIONS if request.param in HALVES else ():
        monkeypatch.setattr(name, lambda: True)
    if not outruns_torch(request.param):
        pytest.skip("torch's is the faster")
    return request.param


def near(found, exact, dtype):
    """Rounded once from sums in fp32."""
    bound = 1e-6 if dtype == torch.float32 else 1.01 * torch.finfo(dtype).eps / 2
    return found.dtype == dtype and (found.double() - exact).norm() < bound * exact.norm()


@pytest.mark.parametrize("strided", [False, True])
def test_derivatives(strided, dtype):
    torch.manual_seed(0)
    shapes = (3, 150, 112), (96, 112), (96,), (3, 150, 96), (3, 150, 112)
    x, weight, bias, dy, ddx = (torch.randn(shape, dtype=dtype) for shape in shapes)
    if strided:
        x, dy, ddx = (t.transpose(0, 1) for t in (x, dy, ddx))
        weight = weight.t().contiguous().t()
    results = []
    for kind, layer in ((dtype, product), (torch.float64, torch.nn.functional.linear)):
        leaves = [t.detach().to(kind).requires_grad_() for t in (x, weight, bias, dy)]
        y = layer(*leaves[:3])
        first = torch.autograd.grad(y, leaves[:3], leaves[3], create_graph=True)
        results.append((y, *first, *torch.autograd.grad(first[0], (leaves[1], leaves[3]), ddx.to(kind))))
    assert all(near(one, two, dtype) for one, two in zip(*results, strict=True))
    y, wanted = product(x, weight.requires_grad_(), None), torch.ones(3, 150, 96)
    (y if not strided else y.transpose(0, 1)).sum().backward()  # its gradient is expanded
    assert near(weight.grad, wanted.double().flatten(0, 1).t() @ x.reshape(-1, 112).double(), dtype)


def test_gradients_of_whatever_wants_one(dtype):
    torch.manual_seed(0)
    given = torch.randn(5, 7, 331, dtype=dtype), torch.randn(143, 331, dtype=dtype), torch.randn(143, dtype=dtype)
    dy = torch.randn(5, 7, 143, dtype=dtype)
    exact = [t.double().requires_grad_() for t in given]
    exact = torch.autograd.grad(torch.nn.functional.linear(*exact), exact, dy.double())
    for wants in ((True, False, False), (False, True, False), (False, False, True), (True, True, True)):
        leaves = [t.clone().requires_grad_(want) for t, want in zip(given, wants, strict=True)]
        product(*leaves).backward(dy)
        assert [t.grad is not None for t in leaves] == list(wants)
        pairs = [(t.grad, e) for t, e in zip(leaves, exact, strict=True) if t.grad is not None]
        assert all(near(one, two, dtype) for one, two in pairs)


def test_served_only_where_it_is_the_same(dtype):
    layer, x = nk.Linear(112, 96, bias=True, dtype=dtype), torch.randn(450, 112, dtype=dtype)
    given = layer.weight, layer.bias
    assert product(x, *given) is not None
    for other in (x[:9], x.double(), x.to("meta"), x[:, :100]):
        assert product(other, *given) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x, *given) is None and layer(x).dtype == torch.bfloat16
    with nk.backend("reference"):
        assert product(x, *given) is None
    with torch.no_grad():
        exact = torch.nn.functional.linear(x.double(), *(t.double() for t in given))
        assert near(layer(x), exact, dtype)
        assert near(torch.func.vmap(layer)(x[None])[0], exact, dtype)
        assert near(torch.compile(layer, backend="eager", fullgraph=True)(x), exact, dtype)
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, x))
        tangent = exact - layer.bias.double()
        assert near(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent, dtype)


@pytest.mark.parametrize("dtype", HALVES, indirect=True, ids=["bf16", "fp16"])
def test_layers_without_instructions_for_16_bits(dtype, monkeypatch):
    """Of one row to many, with gradients and without, and weights of the same dtype or fp32 ones: never torch's product."""

    def refuse(*given):
        raise AssertionError("torch's product")

    torch.manual_seed(0)
    for weights, counts in ((dtype, (1, 5, 12, 13, 33, 257)), (torch.float32, (5, 32))):
        layer = nk.Linear(301, 203, bias=True, dtype=weights)
        given = [t.detach().to(dtype).double() for t in (layer.weight, layer.bias)]
        for rows in counts:
            x = torch.randn(rows, 301, dtype=dtype)
            exact = torch.nn.functional.linear(x.double(), *given)
            for differentiated in (False, True)[: 1 if rows == 1 else 2]:  # a row's product is not worth a node
                with monkeypatch.context() as patched, torch.set_grad_enabled(differentiated):
                    patched.setattr(torch.nn.functional, "linear", refuse)
                    assert near(layer(x), exact, dtype)


@pytest.mark.parametrize("dtype", HALVES, indirect=True, ids=["bf16", "fp16"])
def test_attention_without_instructions_for_16_bits(dtype):
    """With gradients it is made in fp32, and errs less than torch's; without, and compiled, it is torch's."""

    def torch_s(q, k, v):
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2)

    torch.manual_seed(0)
    dy, *given = (torch.randn(2, 65, heads, 32, dtype=dtype) for heads in (4, 4, 2, 2))
    results = []
    for kind, attention in ((torch.float64, torch_s), (dtype, attend), (dtype, torch_s)):
        leaves = [t.to(kind).requires_grad_() for t in given]
        y = attention(*leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.to(kind))])
        assert all(t.dtype == kind for t in results[-1])
    for exact, ours, torchs in zip(*results, strict=True):
        assert (ours.double() - exact).norm() <= (torchs.double() - exact).norm()
    with torch.no_grad():
        assert torch.equal(attend(*given), torch_s(*given))
    leaves = [t.clone().requires_grad_() for t in given]
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*leaves), torch_s(*leaves))


def test_where_torch_has_no_instructions_for_16_bits():
    try:
        with open("/proc/cpuinfo") as lines:
            flags = next(set(line.split()) for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        pytest.skip("this machine does not list its processor's flags")
    alone = "avx2" in flags and not flags & {"avx512bw", "avx_ne_convert"}
    assert _device.slow_in_16_bits() == alone
