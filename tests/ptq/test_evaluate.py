"""Evaluation against cross-entropies worked out by hand in Python."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nvfp4_kernels.ptq import evaluate as module
from nvfp4_kernels.ptq.evaluate import Text, evaluate, windows
from nvfp4_kernels.train.tokenizer import ByteTokenizer

VOCAB = 7


class Looks(nn.Module):
    """Its prediction hangs on the token and on how many stand before it; remembers what shapes it was given."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0)))
        self.shapes = []

    def forward(self, ids):
        assert not self.training
        self.shapes.append(tuple(ids.shape))
        return self.table[ids] * (1 + torch.arange(ids.shape[1])[:, None] / 100)


def by_hand(ids, table, length):
    """nats of each token but the first, with its position in its window."""
    found = []
    for at in range(len(ids) - 1):
        position = at % length
        row = [v * (1 + position / 100) for v in table[ids[at]]]
        found.append((position, math.log(sum(math.exp(v) for v in row)) - row[ids[at + 1]]))
    return found


def text_of(count: int) -> Text:
    return Text(np.random.default_rng(count).integers(0, VOCAB, count).astype(np.uint8), 3 * count, "drawn")


@pytest.mark.parametrize(
    "count, length", [(2, 5), (17, 5), (21, 5), (40, 1), (40, 39), (40, 4000), (700, 300), (1500, 600)]
)
def test_against_cross_entropies_by_hand(count, length, monkeypatch):
    monkeypatch.setattr(module, "TOKENS", 12)  # several batches
    model, text = Looks(), text_of(count)
    got = evaluate(model.train(), text, length)
    wanted = by_hand(text.ids.tolist(), model.table.tolist(), length)
    assert got.tokens == count - 1 and got.nats == pytest.approx(sum(n for _, n in wanted) / (count - 1), rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(got.nats))
    assert got.bits_a_byte == pytest.approx(sum(n for _, n in wanted) / (3 * count) / math.log(2), rel=1e-5)
    assert model.training and all(rows * width <= max(12, length) for rows, width in model.shapes)
    edges = [(0, 127), (128, 511), (512, 2047)]
    expected = [(a, min(b, got.length - 1)) for a, b in edges if a < got.length]
    assert [(b.first, b.last) for b in got.buckets] == expected
    for bucket in got.buckets:
        mine = [n for position, n in wanted if bucket.first <= position <= bucket.last]
        assert bucket.tokens == len(mine) and bucket.nats == pytest.approx(sum(mine) / len(mine), rel=1e-5)
    assert sum(b.tokens for b in got.buckets) == got.tokens


def test_the_last_windows_of_long_buckets():
    got = evaluate(Looks(), text_of(9000), 8999)
    assert [(b.first, b.last, b.tokens) for b in got.buckets] == [
        (0, 127, 128), (128, 511, 384), (512, 2047, 1536), (2048, 8191, 6144), (8192, 8998, 807),
    ]  # fmt: skip


def test_windows_see_each_token_once():
    for count, length in ((2, 3), (10, 3), (11, 3), (12, 3), (50, 7)):
        ids = np.arange(count)
        seen, labels = [], []
        for rows, right in windows(ids, length, 1000):
            assert torch.equal(right, rows + 1) and rows.shape[1] <= length
            seen += rows.flatten().tolist()
            labels += right.flatten().tolist()
        assert seen == list(range(count - 1)) and labels == list(range(1, count))


def test_a_large_vocabulary_makes_small_batches():
    assert max(rows.shape[0] for rows, _ in windows(np.zeros(9000, np.int64), 64, 131072)) == 32
    assert max(rows.shape[0] for rows, _ in windows(np.zeros(9000, np.int64), 64, 256)) == 128


def test_bytes_are_those_of_the_predicted_tokens():
    text = Text.encode("déjà vu".encode(), ByteTokenizer())
    assert len(text.ids) == 9 and text.text_bytes == 8


def test_figures_are_plain_json():
    import json

    figures = evaluate(Looks(), text_of(200), 50).to_dict()
    assert json.loads(json.dumps(figures)) == figures and figures["tokens_per_second"] > 0


def test_errors():
    with pytest.raises(ValueError, match="text: got 0 tokens in a.txt; allowed: at least 2"):
        Text.encode(b"", ByteTokenizer(), "a.txt")
    with pytest.raises(ValueError, match="text: got 1 token in text; allowed: at least 2"):
        Text.encode(b"x", ByteTokenizer())
    with pytest.raises(ValueError, match="length: got 0; allowed: at least 1"):
        evaluate(Looks(), text_of(5), 0)
    with pytest.raises(ValueError, match="text: got token 7; allowed: 0 to 6, the model's vocabulary"):
        evaluate(Looks(), Text(np.array([1, 7]), 2, "t"), 4)
