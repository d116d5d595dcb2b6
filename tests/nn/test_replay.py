"""ReplayState: decoding in pieces of any size gives the bits of one scan, and forgets what it is told to forget."""

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops._native import native
from tests.drawing import given, settings, st

CHUNK, LENGTH = 8, 45
pytestmark = pytest.mark.skipif(native is None, reason="the native scan alone promises its bits")


def inputs(batch=3, length=LENGTH, dtype=torch.float32, heads=4, head_dim=6, groups=2, state=5):
    shapes = dict(
        x=(batch, length, heads, head_dim), dt=(batch, length, heads), B=(batch, length, groups, state),
        C=(batch, length, groups, state),
    )  # fmt: skip
    tokens = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    fixed = dict(A=-torch.rand(heads) * 2, D=torch.randn(heads), dt_bias=torch.randn(heads))
    return tokens, fixed, torch.randn(batch, heads, head_dim, state)


def cut(tokens, start, end):
    return {name: t[:, start:end] for name, t in tokens.items()}


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(1, 19), min_size=1, max_size=12), st.integers(0, 9), st.sampled_from(["float32", "bfloat16"])
)
def test_pieces_of_any_size_give_the_bits_of_one_scan(pieces, keep, dtype):
    torch.manual_seed(0)
    tokens, fixed, first = inputs(dtype=getattr(torch, dtype))
    whole = nk.selective_scan(**tokens, **fixed, initial_state=first, chunk_size=CHUNK)
    replay, start = nk.ReplayState(first.clone(), CHUNK, keep), 0
    for piece in pieces:
        end = min(start + piece, LENGTH)
        if end == start:
            break
        y = replay.advance(**cut(tokens, start, end), **fixed)
        assert torch.equal(y, whole[:, start:end])
        start = end
        assert max(replay.counts) < CHUNK + keep + CHUNK


def test_rolled_back_tokens_leave_no_trace():
    """Three wrong tokens after each right one, taken back, over chunk borders."""
    tokens, fixed, first = inputs()
    wrong, _, _ = inputs()
    whole = nk.selective_scan(**tokens, **fixed, initial_state=first, chunk_size=CHUNK)
    replay = nk.ReplayState(first.clone(), CHUNK, keep=3)
    for t in range(LENGTH):
        assert torch.equal(replay.advance(**cut(tokens, t, t + 1), **fixed), whole[:, t : t + 1]), t
        replay.advance(**cut(wrong, 0, 3), **fixed)
        replay.rollback(3)


def test_rows_at_different_places():
    """Each row accepts another number of drafted tokens; all give the bits of their own scan."""
    tokens, fixed, first = inputs(batch=2)
    whole = nk.selective_scan(**tokens, **fixed, initial_state=first, chunk_size=CHUNK)
    replay, places = nk.ReplayState(first.clone(), CHUNK, keep=4), [0, 0]
    for accepted in [(1, 4), (2, 2), (4, 1), (3, 3), (1, 2), (4, 4), (2, 1)]:
        drafted = {
            name: torch.stack([t[row, place : place + 4] for row, place in enumerate(places)])
            for name, t in tokens.items()
        }
        y = replay.advance(**drafted, **fixed)
        for row, place in enumerate(places):
            assert torch.equal(y[row], whole[row, place : place + 4])
        replay.rollback([4 - n for n in accepted])
        places = [place + n for place, n in zip(places, accepted, strict=True)]


@pytest.mark.parametrize("started", [False, True])
def test_what_is_refused_leaves_no_trace(started):
    tokens, fixed, first = inputs()
    whole = nk.selective_scan(**tokens, **fixed, initial_state=first, chunk_size=CHUNK)
    replay, start = nk.ReplayState(first.clone(), CHUNK), 5 if started else 0
    if started:
        replay.advance(**cut(tokens, 0, start), **fixed)
    now = cut(tokens, start, start + 4)
    for change, message in (
        (dict(C=now["C"][..., :4]), "C: got "),
        (dict(dt_limit=(1.0, 0.0)), "dt_limit: got"),
        (dict(A=torch.zeros(3)), r"A: got shape \[3\]"),
        (dict(dt=now["dt"][:, :3]), r"dt: got shape \[3, 3, 4\]; allowed: \[3, 4\] and more, as x"),
        (dict(x=now["x"][..., :5]), "x: got|initial_state: got"),
        (dict(B=[1.0]), "B: got list"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            replay.advance(**(now | fixed | change))
    assert replay.counts == [start] * 3
    assert torch.equal(replay.advance(**cut(tokens, start, LENGTH), **fixed), whole[:, start:])


def test_tokens_of_another_kind_are_refused():
    tokens, fixed, first = inputs()
    replay = nk.ReplayState(first, CHUNK)
    replay.advance(**cut(tokens, 0, 3), **fixed)
    with pytest.raises(ValueError, match="x: got torch.bfloat16 .*; allowed: torch.float32 .*, as before"):
        replay.advance(**(cut(tokens, 3, 4) | dict(x=tokens["x"][:, 3:4].bfloat16())), **fixed)
    assert replay.advance(**cut(tokens, 3, 3), **fixed).shape == (3, 0, 4, 6) and replay.counts == [3, 3, 3]


def test_errors_name_the_argument():
    replay = nk.ReplayState(torch.zeros(2, 4, 6, 5), CHUNK)
    with pytest.raises(ValueError, match="tokens: got 1 for row 0; allowed: 0 to 0"):
        replay.rollback(1)
    with pytest.raises(ValueError, match="tokens: got 3 numbers; allowed: 2, one for each row"):
        replay.rollback([0, 0, 0])
    with pytest.raises(TypeError, match="border: got torch.bfloat16; allowed: float32, float64"):
        nk.ReplayState(torch.zeros(2, 4, 6, 5).bfloat16(), CHUNK)
    with pytest.raises(ValueError, match="chunk_size: got 0"):
        nk.ReplayState(torch.zeros(2, 4, 6, 5), 0)
    tokens, fixed, _ = inputs(batch=3)
    with pytest.raises(ValueError, match="x: got 3 rows; allowed: 2"):
        replay.advance(**tokens, **fixed)
