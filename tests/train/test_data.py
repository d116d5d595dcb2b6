"""Packing: every token once an epoch, labels, boundaries, determinism, resumption, the held-out split."""

import numpy as np
import pytest

from nvfp4_kernels.train.data import IGNORED, Packer, plan_epoch, split_documents
from tests.drawing import given, settings, st

documents = st.lists(st.integers(1, 90), min_size=1, max_size=30)


def corpus(lengths):
    """Ids that name their own position, so that a batch shows where each token came from."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.arange(starts[-1], dtype=np.uint32), np.stack([starts[:-1], starts[1:]], 1)


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(2, 40), st.integers(0, 5))
def test_each_token_once_an_epoch(lengths, length, seed):
    ids, spans = corpus(lengths)
    usable = np.concatenate([np.arange(a, b) for a, b in spans if b - a >= 2] or [[]])
    if len(usable) < length:
        with pytest.raises(ValueError, match="--length"):
            Packer(ids, spans, 1, length, seed)
        return
    packer = Packer(ids, spans, 1, length, seed)
    for epoch in range(2):
        seen = []
        while packer.epoch == epoch:
            seen.append(next(packer).ids.flatten().numpy())
        seen = np.concatenate(seen)
        assert len(np.unique(seen)) == len(seen) and np.isin(seen, usable).all()
        assert len(usable) - len(seen) < length


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(2, 24), st.integers(1, 4), st.sampled_from([None, 7000]))
def test_labels_and_boundaries(lengths, length, batch, end_label):
    ids, spans = corpus(lengths)
    if sum(n for n in lengths if n >= 2) < length:
        return
    ends = {int(b) - 1 for _, b in spans}
    packer = Packer(ids, spans, batch, length, 3, end_label)
    for _ in range(5):
        got = next(packer)
        flat, labels, cuts = got.ids.flatten().tolist(), got.labels.flatten().tolist(), got.cu_seqlens.tolist()
        assert cuts[0] == 0 and cuts[-1] == batch * length and all(a < b for a, b in zip(cuts, cuts[1:], strict=False))
        assert set(range(0, batch * length + 1, length)) <= set(cuts)  # a row never continues the one before
        for token, label in zip(flat, labels, strict=True):
            last = IGNORED if end_label is None else end_label
            assert label == (last if token in ends else token + 1)
        for a, b in zip(cuts, cuts[1:], strict=False):  # a piece is contiguous text of one document
            assert flat[a:b] == list(range(flat[a], flat[a] + b - a))
            assert not ends & set(flat[a : b - 1])
        assert got.targets == sum(label != IGNORED for label in labels)


def test_full_rows_keep_their_context():
    """Long documents mostly give rows of one piece: only what does not fill a row is cut further."""
    starts = np.arange(0, 100_000, 1000, dtype=np.int64)
    plan = plan_epoch(starts, starts + 1000, 64, seed=0, epoch=0)
    whole = np.diff(plan.first) == 1
    assert whole.mean() > 0.85


def test_same_seed_same_batches_and_other_seeds_not():
    ids, spans = corpus([50] * 40)
    first, second, other = (Packer(ids, spans, 4, 32, seed) for seed in (1, 1, 2))
    same = [(next(first).ids, next(second).ids) for _ in range(30)]
    assert all(a.equal(b) for a, b in same)
    assert not same[0][0].equal(next(other).ids)


def test_epochs_are_cut_and_ordered_anew():
    ids, spans = corpus([1000])
    packer = Packer(ids, spans, 1, 100, 0)
    epochs = {0: set(), 1: set()}
    while packer.epoch < 2:
        epoch = packer.epoch
        epochs[epoch].add(int(next(packer).ids[0, 0]) % 100)
    assert epochs[0] != epochs[1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 40))
def test_position_resumes(steps):
    ids, spans = corpus([37] * 30)
    whole = Packer(ids, spans, 3, 16, 5)
    for _ in range(steps):
        next(whole)
    resumed = Packer(ids, spans, 3, 16, 0)
    resumed.load_state(whole.state())
    for _ in range(5):
        a, b = next(whole), next(resumed)
        assert a.ids.equal(b.ids) and a.labels.equal(b.labels) and a.cu_seqlens.equal(b.cu_seqlens)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=50), st.floats(0.01, 0.4), st.integers(1, 50))
def test_split_holds_out_enough_and_nothing_twice(lengths, fraction, least):
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    wanted = max(int(starts[-1] * fraction), least)
    if 2 * wanted > starts[-1]:
        with pytest.raises(ValueError, match="--validation 0"):
            split_documents(starts, fraction, least)
        return
    train, held = split_documents(starts, fraction, least)
    covered = np.concatenate([np.arange(a, b) for a, b in np.concatenate([train, held])])
    assert len(covered) == starts[-1] and len(np.unique(covered)) == len(covered)
    assert (held[:, 1] - held[:, 0]).sum() >= wanted
    assert (train[:, 1] - train[:, 0]).sum() > 0
