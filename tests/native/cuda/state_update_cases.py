"""state_update in CUDA, on the host model, by the tests of the Triton kernel: the formula in float64, Philox in integers."""

import math

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops.state_update import _cuda
from tests.ops import test_state_update_triton as triton_tests
from tests.ops.test_state_update_triton import close, inputs, oracle

test_against_the_formula = triton_tests.test_against_the_formula
test_indices = triton_tests.test_indices
test_intermediate_keeps_the_state = triton_tests.test_intermediate_keeps_the_state
test_several_tokens_are_as_many_calls = triton_tests.test_several_tokens_are_as_many_calls
test_views_of_wider_tensors = triton_tests.test_views_of_wider_tensors
test_noise_is_philox_and_the_rule_bit_for_bit = triton_tests.test_noise_is_philox_and_the_rule_bit_for_bit
test_small_steps_keep_their_relative_accuracy = triton_tests.test_small_steps_keep_their_relative_accuracy
test_nan_steps_stay_nan = triton_tests.test_nan_steps_stay_nan


@pytest.fixture(autouse=True)
def forced():
    with nk.backend("native"):
        yield


@pytest.mark.parametrize(
    "heads, head_dim, groups, size", [(3, 80, 1, 16), (2, 1, 2, 1), (2, 64, 1, 128), (2, 17, 2, 200), (1, 33, 1, 256)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shapes(model, heads, head_dim, groups, size, dtype):
    values = inputs(1, 2, heads, head_dim, groups, size)
    values["D"] = torch.randn(heads, head_dim)
    values["state"] = values["state"].to(dtype)
    expected, states = oracle(values)
    y = nk.state_update(**values)
    coarse = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    close(y, expected, coarse)
    close(values["state"], states[:, -1], coarse)
    assert model.kernels == [_cuda.kernel(dtype, size, False)[0]]


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_of_sixteen_bit_inputs(dtype, noisy):
    """x, B, C and the state in 16 bits and a step that exp takes to 1: the reference's own bits in the state."""
    values = inputs(2, 3, 4, 33, 2, 128, dtype=dtype) | {"A": torch.zeros(4), "dt_bias": None}
    values = {n: v.to(dtype) if n in ("x", "B", "C", "z") else v for n, v in values.items()}
    other, noise = values["state"].clone(), torch.tensor([9, 2**33]) if noisy else None
    options = dict(dt_softplus=False, dt_limit=(0.25, 0.25), noise=noise)
    with nk.backend("reference"):
        expected = nk.state_update(**(values | {"state": other}), **options)
    y = nk.state_update(**values, **options)
    assert y.dtype == dtype and torch.equal(values["state"], other)
    close(y, expected.double(), 2**-7)


def test_a_slot_that_does_not_exist(model):
    """On a GPU nobody can raise: NaN, and no state is touched."""
    values = inputs(batch=2, slots=3)
    before = values["state"].clone()
    y = nk.state_update(**values, indices=torch.tensor([3, 1]))
    assert y[0].isnan().all() and y[1].isfinite().all()
    assert torch.equal(values["state"][[0, 2]], before[[0, 2]])


def test_infinite_inputs_stay_in_their_row():
    values = inputs(1, 1, 2, 5, 1, 100) | {"z": None, "D": None}
    values["x"][0, 0, 1, 3] = math.inf
    y = nk.state_update(**values)
    assert y.isfinite().sum() == 9 and not y[0, 0, 1, 3].isfinite()


def test_no_rows():
    values = inputs(batch=0, tokens=2)
    assert nk.state_update(**values).shape == (0, 2, 4, 3)


def test_kernels_and_refusals():
    assert _cuda.kernel(torch.bfloat16, 128, True) == ("state_update_noisy_bf16_128", 128, 16)
    assert _cuda.kernel(torch.float32, 129, False) == ("state_update_fp32_256", 256, 16)
    assert "above 256" in _cuda.refuses(torch.zeros(1, 1, 1, 257), torch.zeros(1))
