"""Two processes train as one with twice the micro-batches, replicated or sharded, bit for bit where sums have one order."""

import math
import os
import subprocess
import sys

import pytest
import torch

from nvfp4_kernels.checkpoint import snapshot
from nvfp4_kernels.train.progress import read_metrics
from nvfp4_kernels.train.ranks import ALONE, Ranks, buckets
from nvfp4_kernels.train.settings import Settings
from nvfp4_kernels.train.setup import load_run
from tests.distributed import together
from tests.distributed.together import (
    CONFIG,
    alone,
    assert_same,
    half,
    make,
    outcome,
    parallel,
    reloaded,
    same_input,
    trainer,
)


@pytest.mark.parametrize("recipe, clip", [("bf16", 0.1), ("nearest", math.inf)])
def test_a_step_of_two_is_the_step_of_one_with_twice_the_micro_batches(pair, recipe, clip):
    expected, model = outcome(trainer(ALONE, recipe, False, 2, clip))
    (reports, first), (others, second) = pair(together.steps, recipe, False, 1, clip)
    assert reports == others == expected
    assert_same(first, model)
    assert_same(second, model)


def test_sharded_is_the_same_as_replicated(pair):
    """With stochastic rounding too; the norm's sum alone, by which clipping multiplies, has another order."""
    (reports, model), (others, second) = pair(together.steps, "nvfp4", False)
    (sharded, gathered), (_, nothing) = pair(together.steps, "nvfp4", True)
    for (losses, norm, *rest), (losses_2, norm_2, *rest_2) in zip(reports, sharded, strict=True):
        assert losses == losses_2 and rest == rest_2 and norm == pytest.approx(norm_2, rel=1e-6)
    assert_same(model, second)
    assert_same(gathered, model)
    assert others == reports and nothing == {}
    assert any(int(t[1]) > 0 for name, t in model.items() if name.endswith("noise"))


def test_routers_see_the_load_of_all_ranks(pair):
    one, two = pair(together.load_of)
    t = trainer(ALONE, "bf16", False, 2)
    t.model.update_router_bias = lambda: None
    t.run_step()
    assert one == two == [n for r in t.model.routers().values() for n in r.load.tolist()]
    assert len(set(one)) > 1


def test_ranks_round_by_noise_of_their_own_from_equal_states(pair):
    (dx, dw, noise), (dx_2, dw_2, noise_2) = pair(together.rounded_gradient)
    alone = together.rounded_gradient(ALONE)
    assert noise.equal(noise_2) and noise.equal(alone[2]) and int(noise[1]) > 0
    assert dx.equal(alone[0]) and dw.equal(alone[1])
    for one, two in ((dx, dx_2), (dw, dw_2)):
        assert 0 < float((one - two).norm() / one.norm()) < 0.3


@pytest.mark.parametrize("sharded", [False, True])
def test_a_bad_gradient_of_one_rank_skips_the_step_of_all(pair, sharded):
    (*first, model), (*second, other) = pair(together.bad_on_one, sharded)
    assert first == second == [True, "backbone.layers.0.mixer.in_proj, y", True, False, 1]
    if not sharded:
        assert_same(model, other)


@pytest.mark.parametrize("sharded", [False, True])
def test_validation_is_shared(pair, sharded):
    """Three batches on two ranks, with different numbers of targets."""
    t = trainer(ALONE, "bf16", False)
    expected = t.validate([next(t.data) for _ in range(3)])
    assert pair(together.validated, sharded) == [pytest.approx(expected, rel=1e-12)] * 2


def test_buckets_hold_all_in_order(monkeypatch):
    monkeypatch.setattr("nvfp4_kernels.train.ranks.BUCKET", 10)
    tensors = [torch.zeros(n) for n in (4, 6, 1, 30, 2, 2)]
    got = list(buckets(tensors))
    assert [[t.numel() for t in b] for b in got] == [[4, 6], [1], [30], [2, 2]] and list(buckets([])) == []


def test_shares_are_even():
    assert [Ranks(r, 3).share(4) for r in range(3)] == [[0, 3], [1, 4], [2, 5]] and ALONE.share(2) == [0, 1]


@pytest.fixture
def settings(tmp_path) -> Settings:
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / f"text/{i}.txt").write_text(
            f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * (5 + i)
        )
    CONFIG.save(tmp_path)
    return Settings(
        config=str(tmp_path / "config.json"), data=str(tmp_path / "text"), batch=2, length=48, steps=6, lr=5e-3, warmup=2,
        decay=0.3, save_every=4, health_every=2, validation=0.1, validation_tokens=288, out=str(tmp_path / "run"), threads=1,
    )  # fmt: skip


def rows(run) -> list[dict]:
    timed = "seconds", "tokens_per_second"
    return [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(run / "metrics.jsonl")]


def model_of(run):
    return snapshot.newest(run / "checkpoints")[0].tensors("model")


def test_a_run_stops_together_and_resumes_bit_for_bit(pair, settings, tmp_path):
    whole = settings.replace(out=str(tmp_path / "whole"))
    ended, other = pair(together.train, whole)
    assert ended == other and ended[:2] == (6, False)
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {
        "config.json", "run.json", "metrics.jsonl", "checkpoints", "loss.png", "health.png"}  # fmt: skip
    stopped, other = pair(together.train, settings, False, 3)
    assert stopped == other and stopped[:2] == (3, True)
    run = tmp_path / "run"
    refused = together.train(ALONE, settings, True)
    assert "accumulate: got 1 on 1 processes; allowed: what gives 2 micro-batches a step" in refused
    resumed, _ = pair(together.train, settings, True)
    assert resumed[:3] == ended[:3] and rows(run) == rows(tmp_path / "whole")
    assert_same(model_of(run), model_of(tmp_path / "whole"))
    assert load_run(run)[2] == 6
    first, second = pair(together.train_apart, settings, str(tmp_path / "elsewhere"))
    assert first == second and "to start at step 0 and" in first
    assert first.endswith("to start at step 6; allowed: the same in all processes")


def test_a_sharded_run_goes_on_unsharded_and_in_one_process(pair, settings, tmp_path):
    """Snapshots are the same in all three; without clipping so are the runs, but for the sums' rounding."""
    settings = settings.replace(recipe="bf16", clip=math.inf, health_every=0)
    whole = settings.replace(out=str(tmp_path / "whole"), accumulate=2)
    together.train(ALONE, whole)
    run = tmp_path / "run"
    pair(together.train, settings.replace(shard=True), False, 2)
    pair(together.train, settings, True, 4)
    refused = together.train(ALONE, settings.replace(accumulate=2, shard=True), True)
    assert refused.startswith("shard: got one process; allowed: several (do: torchrun --nproc-per-node 2 -m")
    assert together.train(ALONE, settings.replace(accumulate=2), True)[:2] == (6, False)
    got, expected = rows(run), rows(tmp_path / "whole")
    norms, others = ([row.pop("gradient_norm", 0.0) for row in made] for made in (got, expected))
    assert got == expected and norms == pytest.approx(others, rel=1e-6)
    assert_same(model_of(run), model_of(tmp_path / "whole"))


def test_what_fails_on_the_first_fails_on_all(pair, settings, tmp_path):
    (tmp_path / "blocked").write_text("")
    first, second = pair(together.train, settings.replace(out=str(tmp_path / "blocked/run")))
    assert first == second and "blocked/run cannot be written" in first


def test_torchrun(settings, tmp_path):
    """The command line, sharded, with text at its end; rank 0 alone tells."""
    flags = [
        "--config",
        settings.config,
        "--data",
        settings.data,
        "--out",
        settings.out,
        "--steps",
        "2",
        "--batch",
        "2",
    ]
    flags += ["--length", "48", "--validation", "0", "--health-every", "0", "--sample", "8", "--shard"]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "nvfp4_kernels",
    ]
    path = {"PYTHONPATH": os.pathsep.join([str(together.ROOT), *sys.path])}
    done = subprocess.run(
        [*launch, "train", *flags], env=os.environ | path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 steps, ") == 1 and done.stdout.count("def ") == 1
    assert load_run(settings.out)[2] == 2


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
