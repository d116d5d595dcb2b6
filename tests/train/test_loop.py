"""The loop: accumulation equals a large batch, resumption is bitwise, bad steps are skipped and their origin named."""

import math

import pytest
import torch

from nvfp4_kernels.train.loop import PATIENCE, Diverged


def losses(trainer, steps):
    return [trainer.run_step().losses["lm"] for _ in range(steps)]


def test_it_learns_and_calls_the_router(make_trainer):
    trainer = make_trainer()
    first, *_, last = losses(trainer, 40)
    assert last < 0.5 * first and trainer.model.bias_updates == 40
    assert trainer.tokens == 40 * 64 and trainer.step == 40


def test_accumulation_equals_one_large_batch(make_trainer):
    """In fp32 up to the order of sums; the micro-batches have different numbers of targets."""
    small, large = make_trainer(quantized=False, accumulate=3, batch=2), make_trainer(quantized=False, batch=6)
    for trainer in (small, large):
        trainer.model.float()
        trainer.model.forward = lambda ids, cu_seqlens=None, m=trainer.model: m.lm_head(m.embed(ids))
    micro = [next(small.data) for _ in range(3)]
    whole = next(large.data)
    assert torch.cat([b.ids for b in micro]).equal(whole.ids) and len({b.targets for b in micro}) > 1
    one, _ = small.accumulate_gradients(micro)
    two, _ = large.accumulate_gradients([whole])
    assert one["lm"] == pytest.approx(two["lm"], rel=1e-6)
    torch.testing.assert_close(small.model.lm_head.weight.grad, large.model.lm_head.weight.grad, rtol=1e-4, atol=1e-7)


def test_batches_without_targets_teach_nothing(make_trainer):
    """As where every document is one token long."""
    trainer = make_trainer(accumulate=2)
    batches = [next(trainer.data) for _ in range(2)]
    for batch in batches:
        batch.labels.fill_(-100)
    sums, _ = trainer.accumulate_gradients(batches)
    assert sums["total"] == 0 and all(not p.grad.any() for p in trainer.parameters)


def test_clipping_and_learning_rate(make_trainer):
    trainer = make_trainer(clip=1e-3)
    seen = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (
        seen.append(torch.nn.utils.get_total_norm([p.grad for p in trainer.parameters])),
        step(),
    )
    report = trainer.run_step()
    assert report.gradient_norm > 1e-2 and float(seen[0]) == pytest.approx(1e-3, rel=1e-3)
    assert report.lr == pytest.approx(1e-2 / 5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_steps_are_bitwise_the_same(make_trainer, accumulate):
    whole = make_trainer(accumulate=accumulate, health_every=3)
    losses(whole, 4)
    state, tensors = whole.state(), {k: {n: t.clone() for n, t in g.items()} for k, g in whole.tensors().items()}
    expected = losses(whole, 6)
    resumed = make_trainer(seed=9, accumulate=accumulate)  # another seed: everything must come from the state
    resumed.load(state, tensors.__getitem__)
    assert losses(resumed, 6) == expected
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert a.equal(b)


def test_noise_matters_to_the_state(make_trainer):
    """The resumption test can fail: without the noise buffers the losses differ."""
    whole = make_trainer()
    losses(whole, 4)
    state, tensors = whole.state(), {k: {n: t.clone() for n, t in g.items()} for k, g in whole.tensors().items()}
    expected = losses(whole, 6)
    for name, tensor in tensors["model"].items():
        if name.endswith("noise"):
            tensor[0] += 1
    resumed = make_trainer(seed=9)
    resumed.load(state, tensors.__getitem__)
    assert losses(resumed, 6) != expected


def test_observing_leaves_no_trace(make_trainer):
    assert losses(make_trainer(health_every=1), 5) == losses(make_trainer(health_every=0), 5)


def test_validation_leaves_no_trace(make_trainer):
    plain, checked = make_trainer(), make_trainer()
    losses(plain, 3)
    losses(checked, 3)
    check = next(make_trainer(seed=5).data)
    before = {n: t.clone() for n, t in checked.model.state_dict().items()}
    loss = checked.validate([check])
    assert loss == pytest.approx(float(checked.model.loss(check.ids, check.labels).lm.detach()))
    assert all(t.equal(before[n]) for n, t in checked.model.state_dict().items())
    assert losses(plain, 3) == losses(checked, 3)


def poison_weight(model):
    with torch.no_grad():
        model.layers[1][1].weight[3, 5] = math.nan


def poison_input(model):
    model.layers[1][1].register_forward_pre_hook(lambda m, args: (torch.full_like(args[0], math.inf),))


def poison_gradient(model):
    model.layers[1][1].register_forward_hook(lambda m, args, y: y.register_hook(lambda dy: dy * math.nan) and None)


def poison_weight_gradient(model):
    model.layers[1][1].weight.register_hook(lambda dw: dw * math.inf)


def poison_output(model):
    model.layers[1][1].register_forward_hook(lambda m, args, y: y * math.inf)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("poison, tensor", [
    (poison_weight, "w"), (poison_input, "x"), (poison_gradient, "dy"), (poison_weight_gradient, "dw"), (poison_output, "y"),
])  # fmt: skip
def test_bad_step_changes_nothing_and_names_layer_and_tensor(make_trainer, quantized, poison, tensor):
    trainer = make_trainer(quantized)
    losses(trainer, 2)
    poison(trainer.model)
    before = {n: t.clone() for n, t in trainer.model.named_parameters()}
    report = trainer.run_step()
    assert report.bad and trainer.skipped == 1 and trainer.step == 3
    assert (report.skipped.layer, report.skipped.tensor) == ("layers.1.1", tensor)
    assert all(torch.equal(t.nan_to_num(), before[n].nan_to_num()) for n, t in trainer.model.named_parameters())
    assert all(p.grad is None for p in trainer.parameters) and trainer.model.bias_updates == 2


def test_a_run_recovers_from_one_bad_batch(make_trainer):
    trainer = make_trainer()
    handle = trainer.model.layers[2][1].register_forward_hook(lambda m, args, y: y * math.nan)
    assert trainer.run_step().bad
    handle.remove()
    assert not trainer.run_step().bad and trainer.skipped_in_a_row == 0 and trainer.skipped == 1


def test_patience_ends(make_trainer):
    trainer = make_trainer()
    poison_weight(trainer.model)
    for _ in range(PATIENCE):
        trainer.check_patience()
        trainer.run_step()
    with pytest.raises(Diverged, match="10 steps in a row without a finite gradient, up to step 10; do: ") as caught:
        trainer.check_patience()
    assert "\n" not in str(caught.value)
