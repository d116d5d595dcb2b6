"""Documents packed into rows [batch, length], in an order that a seed fixes and a position that can be resumed.

Each epoch cuts the documents into pieces of at most `length` tokens, at offsets drawn anew, so that over epochs a
token is seen behind different contexts. A piece of full length is a row of its own; the shorter ones are shuffled and
laid end to end into further rows. Then the rows are shuffled. Every token of a document of two tokens or more is seen
once an epoch, but for fewer than `length` tokens at the end of the short pieces.
Tried: one long stream of shuffled documents; its batches hold neighbouring text, and the loss is noisier for it.
"""

from dataclasses import dataclass

import numpy as np
import torch

IGNORED = -100  # the label of a token that has nothing to predict: a document's last one, without an end_label


@dataclass(frozen=True)
class Batch:
    """ids, labels: int64 [batch, length]; cu_seqlens: int32 [pieces + 1] over the batch * length flattened tokens."""

    ids: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: torch.Tensor

    @property
    def targets(self) -> int:
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True)
class Epoch:
    """Segments in row order: segment i is ids[start[i] : start[i] + size[i]] of a document that ends at end[i]; row r
    holds the segments first[r] to first[r + 1]; the epoch visits the rows in the order of `rows`."""

    start: np.ndarray
    size: np.ndarray
    end: np.ndarray
    first: np.ndarray
    rows: np.ndarray


def plan_epoch(starts: np.ndarray, ends: np.ndarray, length: int, seed: int, epoch: int) -> Epoch:
    random = np.random.default_rng([seed, epoch])
    tokens = ends - starts
    # The first piece of a long document is cut at a random place, the others follow in full lengths.
    first = np.where(tokens > length, random.integers(1, length + 1, len(tokens)), tokens)
    pieces = 1 + -(-np.maximum(tokens - first, 0) // length)
    document = np.repeat(np.arange(len(tokens)), pieces)
    index = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = np.where(index == 0, 0, first[document] + (index - 1) * length)
    size = np.minimum(first[document] + index * length, tokens[document]) - begin

    order = random.permutation(len(size))
    order = order[np.argsort(size[order] != length, kind="stable")]  # full pieces first: each falls on a row exactly
    place = np.concatenate([[0], np.cumsum(size[order])])
    count = int(place[-1]) // length
    cuts = np.unique(np.concatenate([place[place < count * length], np.arange(count + 1) * length]))
    piece = np.searchsorted(place, cuts[:-1], "right") - 1
    source = order[piece]
    start = starts[document[source]] + begin[source] + cuts[:-1] - place[piece]
    rows_first = np.searchsorted(cuts, np.arange(count + 1) * length)
    return Epoch(start, np.diff(cuts), ends[document[source]], rows_first, random.permutation(count))


class Packer:
    """An endless iterator of Batches over the documents spans[i] = [start, end) of one array of ids."""

    def __init__(
        self, ids: np.ndarray, spans: np.ndarray, batch: int, length: int, seed: int, end_label: int | None = None
    ):
        self.ids, (self.starts, self.ends) = ids, spans[spans[:, 1] - spans[:, 0] >= 2].T  # one token predicts nothing
        self.batch, self.length, self.seed = batch, length, seed
        self.end_label = IGNORED if end_label is None else end_label
        tokens = int((self.ends - self.starts).sum())
        if tokens < length:
            raise ValueError(
                f"data: got {tokens} tokens; allowed: at least one sequence of {length} "
                "(do: give more text, or a smaller --length)"
            )
        self.epoch, self.cursor, self.planned = 0, 0, None

    def __iter__(self) -> "Packer":
        return self

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "cursor": self.cursor, "seed": self.seed}

    def load_state(self, state: dict[str, int]) -> None:
        self.epoch, self.cursor, self.seed, self.planned = state["epoch"], state["cursor"], state["seed"], None

    def next_row(self) -> list[tuple[int, int, int]]:
        """The next row's segments (start, size, end of the document), and one step onward."""
        if self.planned is None:
            self.planned = plan_epoch(self.starts, self.ends, self.length, self.seed, self.epoch)
        plan = self.planned
        row = plan.rows[self.cursor]
        segments = slice(plan.first[row], plan.first[row + 1])
        self.cursor += 1
        if self.cursor == len(plan.rows):
            self.epoch, self.cursor, self.planned = self.epoch + 1, 0, None
        return list(zip(plan.start[segments], plan.size[segments], plan.end[segments], strict=True))

    def skip(self) -> None:
        """One batch onward, without it."""
        for _ in range(self.batch):
            self.next_row()

    def __next__(self) -> Batch:
        ids = np.empty(self.batch * self.length, np.int64)
        labels = np.empty(self.batch * self.length, np.int64)
        bounds = [0]
        for _ in range(self.batch):
            for start, size, end in self.next_row():
                at, known = bounds[-1], min(size, end - start - 1)  # all but the document's last token
                ids[at : at + size] = self.ids[start : start + size]
                labels[at : at + known] = self.ids[start + 1 : start + 1 + known]
                labels[at + known : at + size] = self.end_label
                bounds.append(at + int(size))
        shape = (self.batch, self.length)
        return Batch(
            torch.from_numpy(ids).view(shape),
            torch.from_numpy(labels).view(shape),
            torch.tensor(bounds, dtype=torch.int32),
        )


def split_documents(starts: np.ndarray, fraction: float, least: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) spans [n, 2]: whole documents are held out, drawn by a fixed seed so that every run over
    a corpus is measured on the same text, until they hold `fraction` of the tokens and at least `least`.

    The tail of a corpus that is one document, or whose held-out document is too long by far, is held out instead."""
    spans = np.stack([starts[:-1], starts[1:]], axis=1)
    total = int(starts[-1])
    wanted = max(int(total * fraction), least)
    if fraction <= 0:
        return spans, spans[:0]
    if wanted * 2 > total:
        raise ValueError(
            f"data: got {total} tokens; allowed: at least {2 * wanted}, twice what validation holds out "
            "(do: give more text, a smaller --length, or --validation 0)"
        )
    order = np.random.default_rng(0).permutation(len(spans))
    size = (spans[:, 1] - spans[:, 0])[order]
    order = order[size <= wanted]  # one huge document must not swallow the training set
    held = order[: int(np.searchsorted(np.cumsum((spans[:, 1] - spans[:, 0])[order]), wanted)) + 1]
    if int((spans[held, 1] - spans[held, 0]).sum()) >= wanted:
        keep = np.ones(len(spans), bool)
        keep[held] = False
        return spans[keep], spans[np.sort(held)]
    cut = total - wanted
    return (
        np.stack([starts[:-1], np.minimum(starts[1:], cut)], axis=1)[starts[:-1] < cut],
        np.stack([np.maximum(starts[:-1], cut), starts[1:]], axis=1)[starts[1:] > cut],
    )
