"""The containers: moving, pickling, safetensors, views, refusals; and the 128x4 swizzle."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import nvfp4_kernels as nk
from tests.drawing import given, settings, st


@pytest.fixture(params=["1x16", "1x32"])
def q(request):
    return nk.quantize(torch.randn(6, 5, 40), block=request.param)


def same(a, b):
    mine, theirs = a.tensors(), b.tensors()
    return (
        type(a) is type(b) and a.shape == b.shape and all(torch.equal(mine[k].float(), theirs[k].float()) for k in mine)
    )


def test_copies_are_equal_and_apart(q):
    for other in (q.clone(), pickle.loads(pickle.dumps(q)), copy.deepcopy(q)):
        assert same(q, other)
        assert other.codes.data_ptr() != q.codes.data_ptr()
    assert same(q, q.detach()) and same(q, q.to("cpu"))
    assert q.to("meta").device.type == "meta"
    with pytest.raises(TypeError, match="dtype"):
        q.to(torch.float32)


def test_safetensors_round_trip(q, tmp_path):
    save_file(q.tensors("w."), tmp_path / "w.safetensors")
    parts = {k.removeprefix("w."): v for k, v in load_file(tmp_path / "w.safetensors").items()}
    assert same(q, type(q)(**parts, shape=q.shape))


def test_loads_where_only_weights_may(q, tmp_path):
    torch.save({"w": q}, tmp_path / "w.pt")
    assert same(q, torch.load(tmp_path / "w.pt", weights_only=True)["w"])


def test_bytes_and_text():
    q = nk.quantize(torch.randn(128, 256))
    assert q.nbytes == 128 * 256 // 2 + 128 * 256 // 16 + 4
    assert "NVFP4Tensor(shape=[128, 256]" in repr(q) and "hadamard=0xd7e8" in repr(
        nk.quantize(torch.ones(2, 16), hadamard=0xD7E8)
    )
    packed = nk.PackedNVFP4Tensor.pack(q)
    assert repr(packed) == repr(q).replace("NVFP4Tensor", "PackedNVFP4Tensor")
    assert "device='meta'" in repr(q.to("meta")) and "MXFP8Tensor(shape=[2, 32]" in repr(
        nk.quantize(torch.ones(2, 32), block="1x32")
    )
    assert q.float4.dtype == torch.float4_e2m1fn_x2 and q.float4.data_ptr() == q.codes.data_ptr()


def test_torch_functions_fail_loudly(q):
    with pytest.raises(TypeError):
        torch.add(q, 1)
    for dtype in (torch.float64, torch.int8, "bfloat16"):
        with pytest.raises(TypeError, match=f"dtype: got {dtype}; allowed: bfloat16"):
            q.dequantize(dtype)


def test_misfitting_parts_are_refused():
    q = nk.quantize(torch.randn(4, 32))
    with pytest.raises(ValueError, match="codes: got torch.uint8"):
        nk.NVFP4Tensor(q.codes[:, :8], q.scales, q.global_scale, (4, 32))
    with pytest.raises(ValueError, match="scales: got torch.float32"):
        nk.NVFP4Tensor(q.codes, q.scales.float(), q.global_scale, (4, 32))
    with pytest.raises(ValueError, match="global_scale: got"):
        nk.NVFP4Tensor(q.codes, q.scales, q.global_scale.view(1), (4, 32))


def test_scales_from_elsewhere():
    q = nk.quantize(torch.randn(4, 32))
    codes = q.scales.view(torch.uint8)
    codes[1] = torch.tensor([0x80, 0x7F])  # -0, NaN
    checked = q.checked()
    assert checked.scales.view(torch.uint8).tolist() == [codes[0].tolist(), [0, 0x7F], *codes[2:].tolist()]
    assert codes[1, 0] == 0x80 and checked.codes is q.codes
    for negative in (0x81, 0xFE, 0xFF):
        codes[2, 1] = negative
        with pytest.raises(ValueError, match="scales: got a negative block scale; allowed: 0 to 448"):
            q.checked()


def test_every_code_and_scale_decodes_to_its_definition():
    """All 16 x 256 pairs of code and scale byte (NaN scales included) against Python arithmetic."""
    from tests.oracles.nvfp4_brute import GRID, e4m3_value

    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(256, 1)
    codes = torch.tensor([i | (i + 1) << 4 for i in range(0, 16, 2)], dtype=torch.uint8).repeat(256, 1)
    q = nk.NVFP4Tensor(codes, scales, torch.tensor(0.5), (256, 16))
    for backend in ("reference", "native"):
        with nk.backend(backend):
            decoded = q.dequantize()
        truth = torch.tensor([[s * e4m3_value(b) * 0.5 for s in GRID + [-g for g in GRID]] for b in range(256)])
        assert torch.equal(decoded.nan_to_num(-1e9), truth.float().nan_to_num(-1e9))


@given(st.integers(1, 300), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_swizzle_places_each_scale(rows, blocks):
    scales = torch.randint(0, 256, (rows, blocks), dtype=torch.uint8)
    swizzled = nk.swizzle_128x4(scales)
    assert torch.equal(nk.unswizzle_128x4(swizzled, rows, blocks), scales)
    assert swizzled.numel() == -(-rows // 128) * 128 * (-(-blocks // 4) * 4)
    for r, c in {(0, 0), (rows - 1, blocks - 1), (rows // 2, blocks // 3)}:
        tile = (r // 128) * -(-blocks // 4) + c // 4
        assert swizzled[(tile * 32 + r % 32) * 16 + r % 128 // 32 * 4 + c % 4] == scales[r, c]


def test_swizzle_refuses_a_wrong_size():
    with pytest.raises(ValueError, match="swizzled: got 512"):
        nk.unswizzle_128x4(torch.zeros(512, dtype=torch.uint8), 128, 5)
