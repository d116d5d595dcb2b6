"""Whatever a public function is given, the error names the argument, what came and what is allowed."""

import pytest
import torch

import nvfp4_kernels as nk

X = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
OFFSETS = torch.tensor([0, 3, 10])
STATES = torch.randn(2, 9, 2, 8)
WEIGHTS = torch.randn(4, 32, 64), torch.randn(4, 64, 32)
LOGITS = torch.randn(10, 4)
FP8 = torch.float8_e4m3fn


def quantized():
    return nk.quantize(X)


def scan(x=STATES, **options):
    return nk.selective_scan(x, torch.rand(2, 9, 2), -torch.rand(2), STATES, STATES, **options)


def routed():
    return nk.route(LOGITS, None, 2)


@pytest.mark.parametrize("call, error, message", [
    (lambda: nk.quantize(X, hadamard="x"), TypeError, "signs: got 'x'; allowed: a 16-bit mask"),
    (lambda: nk.hadamard(X, "x"), TypeError, "signs: got 'x'; allowed: a 16-bit mask"),
    (lambda: nk.random_signs(None), TypeError, "seed: got NoneType; allowed: an int"),
    (lambda: nk.random_signs(1 << 70), ValueError, f"seed: got {1 << 70}; allowed: an int of 64 bits"),
    (lambda: nk.quantize_groups(X, [0, 10], None, nk.QuantSpec()), TypeError, "offsets: got list; allowed: an int64 tensor"),
    (lambda: nk.swizzle_128x4(None), TypeError, "scales: got NoneType; allowed: a tensor of one byte an element"),
    (lambda: nk.swizzle_128x4(X), TypeError, "scales: got a torch.strided tensor of torch.float32; allowed: a tensor of one"),
    (lambda: nk.unswizzle_128x4(X, 10, 64), TypeError, "swizzled: got a torch.strided tensor of torch.float32; allowed: "),
    (lambda: nk.unswizzle_128x4(quantized().scales, "x", 4), TypeError, "rows: got str; allowed: an int"),
    (lambda: scan(STATES.to(FP8)), TypeError, "x: got torch.float8_e4m3fn; allowed: bfloat16, float16, float32, float64"),
    (lambda: scan(chunk_size="x"), TypeError, "chunk_size: got str; allowed: an int"),
    (lambda: nk.gated_rms_norm(X, None, torch.ones(64), group_size="x"), TypeError, "group_size: got str; allowed: an int"),
    (lambda: nk.gated_rms_norm(X, None, torch.ones(64), eps="x"), TypeError, "eps: got str; allowed: a number"),
    (lambda: nk.gated_rms_norm(X, None, torch.ones(64), eps=-1e-5), ValueError, "eps: got -1e-05; allowed: at least 0"),
    (lambda: nk.gated_rms_norm(X, None, torch.ones(64), eps=float("nan")), ValueError, "eps: got nan; allowed: at least 0"),
    (lambda: nk.route(LOGITS, None, 2, scale="x"), TypeError, "scale: got str; allowed: a number"),
    (lambda: nk.route(LOGITS, None, None), TypeError, "top_k: got NoneType; allowed: an int"),
    (lambda: nk.route(LOGITS, LOGITS[0].to(FP8), 2), TypeError, "bias: got torch.float8_e4m3fn; allowed: bfloat16"),
    (lambda: nk.permute(X.to_sparse(), routed()), TypeError, "x: got torch.sparse_coo; allowed: a strided tensor"),
    (lambda: nk.unpermute(X.to_sparse(), routed()), TypeError, "y: got torch.sparse_coo; allowed: a strided tensor"),
    (lambda: nk.expert_mlp(X, routed(), None, WEIGHTS[1]), TypeError, "up: got NoneType; allowed: a Stack or a tensor: "),
    (lambda: nk.expert_mlp(X, routed(), WEIGHTS[0], quantized()), TypeError, "down: got NVFP4Tensor; allowed: a Stack or a "),
    (lambda: nk.weight_only(None, quantized()), TypeError, "x: got NoneType; allowed: a torch.Tensor"),
    (lambda: nk.weight_only(X[:, :0], quantized()), ValueError, "x: got shape [10, 0]; allowed: [..., in], in at least 1"),
    (lambda: nk.weight_only(X[0, 0], quantized()), ValueError, "x: got shape []; allowed: [..., in], in at least 1"),
    (lambda: nk.weight_only(X, "x"), TypeError, "weight: got str; allowed: NVFP4Tensor, MXFP8Tensor, PackedNVFP4Tensor"),
])  # fmt: skip
def test_the_argument_is_named(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("block", ["1x16", "1x32"])
@pytest.mark.parametrize("size", [64, 40])
def test_a_vector_decodes_as_a_matrix_of_one_row(block, size):
    q = nk.quantize(X[0, :size], block=block)
    wanted = nk.quantize(X[:1, :size], block=block).dequantize()
    assert torch.equal(q.dequantize(), wanted[0]) and torch.equal(nk.dequantize(q), wanted[0])
