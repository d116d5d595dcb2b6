"""Converted models, our layers and frozen matrices under DistributedDataParallel and fully_shard, against one process."""

import pytest
import torch

from tests.distributed.together import alone, assert_same, half, make, parallel, reloaded, same_input


@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp bf16"])
@pytest.mark.parametrize("kind", ["converted", "frozen", "mamba", "moe"])
def test_two_steps_are_those_of_one_process(pair, kind, how):
    """Bit for bit: halves of two gradients, and the quantized forms of the weights that the first step gave."""
    gradients, state = alone(kind, "nearest", torch.bfloat16 if how == "fsdp bf16" else torch.float32)
    for got in pair(parallel, kind, "nearest", how):
        assert_same(got[0], gradients)
        assert_same(got[1], state)


def test_what_is_loaded_into_a_sharded_model_is_what_it_computes_with(pair):
    for before, after, held in pair(reloaded):
        model = make("converted", "nearest")
        with torch.no_grad():
            assert before.equal(model(half(0)))
            model.load_state_dict({name: t * 2 for name, t in model.state_dict().items()})
            assert after.equal(model(half(0))) and not after.equal(before)
        assert held == 0


def test_buffers_that_are_broadcast_leave_each_rank_its_noise(pair):
    (dx, state), (dx_2, state_2) = pair(same_input)
    assert_same(state, state_2)
    assert 0 < float((dx - dx_2).norm() / dx.norm()) < 0.3
    assert any(int(t[1]) > 0 for name, t in state.items() if name.endswith("noise"))
