"""Choices against all assignments there are; measured costs against the whole model run with one group quantized."""

import itertools

import numpy as np
import pytest
import torch

from nvfp4_kernels.ptq.activations import quantized_activations
from nvfp4_kernels.ptq.apply import apply
from nvfp4_kernels.ptq.budget import Cost, Group, choose, groups, measure
from nvfp4_kernels.ptq.calibrate import calibrate
from nvfp4_kernels.ptq.formats import BITS, Target, average_bits, targets
from tests.drawing import given, settings, st


def costs_of(sizes, divergences):
    costs = []
    for i, (size, own) in enumerate(zip(sizes, divergences, strict=True)):
        group = Group(f"g{i}", (Target(f"t{i}", (size, 16)),))
        costs += [Cost(group, "nvfp4", own[0], 0.0), Cost(group, "fp8", own[1], 0.0), Cost(group, "bf16", 0.0, 0.0)]
    return costs


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5),
    st.floats(4.5, 17),
)
def test_the_choice_is_the_best_of_all_within_the_budget(members, bits):
    sizes = [size for size, _, _ in members]
    costs = costs_of(sizes, [(a, b) for _, a, b in members])
    chosen = choose(costs, bits)
    found = [Target(f"t{i}", (size, 16)) for i, size in enumerate(sizes)]
    assert average_bits(found, chosen) <= bits + 1e-9
    price = {(cost.group.targets[0].name, cost.format): cost.divergence for cost in costs}
    everything = itertools.product(("nvfp4", "fp8", "bf16"), repeat=len(sizes))
    best = min(
        sum(price[target.name, form] for target, form in zip(found, forms, strict=True))
        for forms in everything
        if average_bits(found, {t.name: f for t, f in zip(found, forms, strict=True)}) <= bits + 1e-9
    )
    assert sum(price[name, form] for name, form in chosen.items()) == pytest.approx(best, abs=1e-12)


def test_real_sizes_and_many_groups():
    random = np.random.default_rng(0)
    sizes = [int(n) for n in random.integers(1000, 5_000_000, 300)]
    costs = costs_of(sizes, [(float(c), float(c) / 8) for c in random.exponential(1, 300)])
    found = [Target(f"t{i}", (size, 16)) for i, size in enumerate(sizes)]
    totals = []
    for bits in (4.5, 4.75, 5, 6, 8, 12, 16):
        chosen = choose(costs, bits)
        price = {(cost.group.targets[0].name, cost.format): cost.divergence for cost in costs}
        totals.append(sum(price[name, form] for name, form in chosen.items()))
        assert bits - 0.02 < average_bits(found, chosen) <= bits or bits == 4.5
    assert totals == sorted(totals, reverse=True) and totals[-1] == 0


def test_nothing_below_the_smallest_formats():
    with pytest.raises(ValueError, match="bits: got 4.4; allowed: at least 4.50, what the smallest formats need"):
        choose(costs_of([3, 5], [(1, 1), (1, 1)]), 4.4)


def test_groups_are_what_runs_as_one(make_model):
    found = groups(targets(make_model("ME*", num_nextn_predict_layers=1)))
    layer = "backbone.layers"
    assert [(g.name, len(g.targets)) for g in found] == [
        (f"{layer}.0.mixer.in_proj", 1), (f"{layer}.0.mixer.out_proj", 1), (f"{layer}.1.mixer.experts", 2),
        (f"{layer}.1.mixer.shared_experts.up_proj", 1), (f"{layer}.1.mixer.shared_experts.down_proj", 1),
        (f"{layer}.1.mixer.fc1_latent_proj", 1), (f"{layer}.1.mixer.fc2_latent_proj", 1),
        (f"{layer}.2.mixer.qkv_proj", 3), (f"{layer}.2.mixer.o_proj", 1),
    ]  # fmt: skip
    narrow = groups(targets(make_model("M", mamba_num_heads=1, mamba_head_dim=24)))
    assert {g.name.rpartition(".")[2]: g.choices for g in narrow} == {
        "in_proj": ("nvfp4", "fp8", "bf16"), "out_proj": ("fp8", "bf16"),
    }  # fmt: skip


@pytest.mark.parametrize("inputs", [True, False])
def test_costs_are_those_of_the_whole_model(inputs, make_model, ids):
    model = make_model("ME*")
    amaxes = calibrate(model, ids, 20) if inputs else None
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []
    costs = measure(model, groups(targets(model)), ids, 20, amaxes, progress=lambda *call: calls.append(call))
    assert calls[-1] == (18, 18) and len(calls) == 18
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    rows, labels = torch.from_numpy(ids[:60]).view(3, 20), torch.from_numpy(ids[1:]).view(3, 20)
    with torch.no_grad():
        old = model(rows).double().log_softmax(-1)
    for cost in costs:
        if cost.format == "bf16":
            assert cost.divergence == cost.loss == 0
            continue
        trial = make_model("ME*")
        chosen = {t.name: cost.format if t in cost.group.targets else "bf16" for t in targets(trial)}
        list(apply(trial, targets(trial), chosen, amaxes))
        with torch.no_grad(), quantized_activations(trial):
            new = trial(rows).double().log_softmax(-1)
        divergence = float((old.exp() * (old - new)).sum(-1).mean())
        rise = float((old - new).gather(-1, labels[..., None]).mean())
        assert cost.divergence == pytest.approx(divergence, rel=1e-3, abs=1e-7), cost.group.name
        assert cost.loss == pytest.approx(rise, rel=1e-3, abs=1e-6)
    by_format = {form: sum(c.divergence for c in costs if c.format == form) for form in BITS}
    assert by_format["nvfp4"] > 4 * by_format["fp8"] > 0
