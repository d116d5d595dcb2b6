"""How well a model predicts a text: perplexity, nats and bits a byte, by how much of the text it had seen before.

The text is cut into windows of `length` tokens. Each token but the first of the text is predicted once, from the tokens
before it in its window and the last one of the window before: position p has p + 1 tokens to look at.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from nvfp4_kernels.ops._check import require

EDGES = (0, 128, 512, 2048, 8192, 32768, 131072, 524288)  # where buckets of positions begin
TOKENS = 8192  # in one forward pass, unless a window is longer
LOGITS = 1 << 28  # in one forward pass, at most: 512 MiB in bf16
Run = Callable[[list[Tensor]], Iterable[Tensor]]  # batches of ids, int64 [rows, length] -> the logits of each


@dataclass(frozen=True)
class Text:
    """ids: the tokens, a one-dimensional array of numpy; text_bytes: those of all tokens but the first."""

    ids: np.ndarray
    text_bytes: int
    source: str

    @classmethod
    def encode(cls, text: bytes, tokenizer, source: str = "text", argument: str = "text") -> "Text":
        """Raises ValueError, naming `argument`, for a text of less than two tokens: it leaves nothing to predict."""
        ids = tokenizer.encode(text)
        what = f"{len(ids)} token{'s' * (len(ids) != 1)} in {source}"
        require(
            len(ids) >= 2, argument, what, "at least 2, one of them to predict (do: give a file with more text in it)"
        )
        return cls(ids, len(text) - len(tokenizer.decode(ids[:1])), source)


@dataclass(frozen=True)
class Bucket:
    """Positions first to last, both included; nats: the mean a token."""

    first: int
    last: int
    tokens: int
    nats: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats) if self.nats < 709 else math.inf


@dataclass(frozen=True)
class Evaluation:
    """nats: the mean a token. seconds: of the forward passes and losses."""

    source: str
    length: int
    tokens: int
    text_bytes: int
    nats: float
    buckets: tuple[Bucket, ...]
    seconds: float

    @property
    def perplexity(self) -> float:
        """Infinite where the mean is beyond what a number can hold."""
        return math.exp(self.nats) if self.nats < 709 else math.inf

    @property
    def nats_a_byte(self) -> float:
        return self.nats * self.tokens / self.text_bytes

    @property
    def bits_a_byte(self) -> float:
        return self.nats_a_byte / math.log(2)

    def to_dict(self) -> dict:
        return {
            "text": self.source, "length": self.length, "tokens": self.tokens, "bytes": self.text_bytes,
            "perplexity": self.perplexity, "nats_a_token": self.nats, "nats_a_byte": self.nats_a_byte,
            "bits_a_byte": self.bits_a_byte, "tokens_per_second": self.tokens / self.seconds, "seconds": self.seconds,
            "by_position": [
                {"first": b.first, "last": b.last, "tokens": b.tokens, "nats_a_token": b.nats, "perplexity": b.perplexity}
                for b in self.buckets
            ],
        }  # fmt: skip


@torch.no_grad()
def evaluate(model: nn.Module, text: Text, length: int, run: Run | None = None) -> Evaluation:
    """The model's own precision and recipe; it is put into eval mode and back.

    length: tokens in a window; a shorter text is one shorter window. run: what gives the model's logits; None: the model
    itself. Raises ValueError naming the argument.
    """
    require(length >= 1, "length", length, "at least 1")
    ids = np.asarray(text.ids, np.int64)
    vocab = model.config.vocab_size
    require(int(ids.max()) < vocab, "text", f"token {int(ids.max())}", f"0 to {vocab - 1}, the model's vocabulary")
    length = min(length, len(ids) - 1)
    sums, counts = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.int64)
    device, training = next(model.parameters()).device, model.training
    run = run or (lambda batches: (model(rows.to(device)) for rows in batches))
    cut = list(windows(ids, length, vocab))
    model.eval()
    start = time.perf_counter()
    try:
        for (rows, labels), logits in zip(cut, run([rows for rows, _ in cut]), strict=True):
            nats = token_nats(logits, labels.to(logits.device)).cpu()
            sums[: rows.shape[1]] += nats.double().sum(0)
            counts[: rows.shape[1]] += rows.shape[0]
    finally:
        model.train(training)
    seconds = time.perf_counter() - start
    buckets = []
    for first, after in zip(EDGES, (*EDGES[1:], length), strict=True):
        if first < length:
            part = slice(first, min(after, length))
            count = int(counts[part].sum())
            buckets.append(Bucket(first, part.stop - 1, count, float(sums[part].sum()) / count))
    total = int(counts.sum())
    return Evaluation(text.source, length, total, text.text_bytes, float(sums.sum()) / total, tuple(buckets), seconds)


def windows(ids: np.ndarray, length: int, vocab: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, labels), int64 [rows, length], for the whole windows of `ids`, then what is left as one shorter row."""
    whole = (len(ids) - 1) // length
    step = max(1, min(TOKENS // length, LOGITS // (length * vocab)))
    table = torch.from_numpy(np.ascontiguousarray(ids, np.int64))
    for first in range(0, whole, step):
        last = min(first + step, whole)
        part = table[first * length : last * length + 1]
        yield part[:-1].view(-1, length), part[1:].view(-1, length)
    if whole * length < len(ids) - 1:
        rest = table[whole * length :]
        yield rest[None, :-1], rest[None, 1:]


def token_nats(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each token, fp32, the shape of labels; widened a row at a time, for logits are the largest tensor."""
    rows = [
        nn.functional.cross_entropy(part.float(), label, reduction="none")
        for part, label in zip(logits, labels, strict=True)
    ]
    return torch.stack(rows)
