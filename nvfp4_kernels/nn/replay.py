"""Decoding that gives, bit for bit, what one scan over the whole sequence gives.

state_update multiplies the state by one decay a token, a scan by the decays of a chunk: the same numbers, rounded
differently. Whoever trains on what a model generates wants them equal. So the state is kept at the border of a chunk alone,
and the inputs since then in a ring, which the scan itself runs over again for each new token. The native backend's scan keeps
the contract that this needs: the bits of a token's y depend on the state that enters its chunk and the tokens of the chunk up
to its own, on nothing else.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import require
from nvfp4_kernels.ops.selective_scan.op import selective_scan


class ReplayState:
    """The state of a scan over rows of different lengths, all in the same place of the model.

    border: fp32 [batch, heads, head_dim, state], of the tokens before the ring: a multiple of chunk_size for each row.
    counts: tokens in each row's ring. keep: how many of the last tokens `rollback` can always take back, which is what
    speculative decoding needs. Memory a row: the border and chunk_size + keep tokens of x, dt, B and C.
    """

    def __init__(self, border: Tensor, chunk_size: int, keep: int = 0):
        require(border.dim() == 4, "border", f"shape {list(border.shape)}", "[batch, heads, head_dim, state]")
        require(chunk_size >= 1, "chunk_size", chunk_size, "at least 1")
        require(keep >= 0, "keep", keep, "0 or more")
        self.border, self.chunk_size, self.keep = border, chunk_size, keep
        self.counts = [0] * border.shape[0]
        self._ring: list[Tensor] | None = None  # x, dt, B, C: [batch, tokens, ...]

    def advance(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, **options
    ) -> Tensor:
        """y of the next tokens, as many for each row: the bits of selective_scan over all so far.

        Arguments as selective_scan's, options being dt_bias, dt_softplus and dt_limit; a gate z is the caller's to put behind
        it, element by element. Not differentiable. Raises ValueError naming the argument.
        """
        batch, tokens = x.shape[:2]
        require(batch == len(self.counts), "x", f"{batch} rows", f"{len(self.counts)}, as border")
        with torch.no_grad():
            starts = list(self.counts)
            self._append((x, dt, B, C))
            ys = torch.empty_like(x, memory_format=torch.contiguous_format)
            for count in sorted(set(starts)):  # rows that stand at the same place go together
                rows = [row for row in range(batch) if starts[row] == count]
                ys[rows] = self._scan(rows, count, tokens, A, D, options)
            return ys

    def rollback(self, tokens: int | Sequence[int]) -> None:
        """Forget each row's last `tokens` (one number, or one for each row), as if they had never come.

        Raises ValueError beyond what the ring still holds; `keep` tokens always are.
        """
        tokens = [tokens] * len(self.counts) if isinstance(tokens, int) else list(tokens)
        for row, (count, back) in enumerate(zip(self.counts, tokens, strict=True)):
            require(0 <= back <= count, "tokens", f"{back} for row {row}", f"0 to {count}, the tokens in its ring")
        self.counts = [count - back for count, back in zip(self.counts, tokens, strict=True)]

    def _append(self, new: tuple[Tensor, ...]) -> None:
        """The new tokens behind those of each row's ring."""
        size = max(self.counts, default=0) + new[0].shape[1]
        if self._ring is None:
            self._ring = [t[:, :0] for t in new]
        if size > self._ring[0].shape[1]:
            room = -(-size // self.chunk_size) * self.chunk_size
            grown = [t.new_zeros(t.shape[0], room, *t.shape[2:]) for t in new]
            for to, old in zip(grown, self._ring, strict=True):
                to[:, : old.shape[1]] = old
            self._ring = grown
        for ring, t in zip(self._ring, new, strict=True):
            for row, count in enumerate(self.counts):
                ring[row, count : count + t.shape[1]] = t[row]
        self.counts = [count + new[0].shape[1] for count in self.counts]

    def _scan(self, rows: list[int], before: int, tokens: int, A, D, options) -> Tensor:
        """y of the last `tokens` of rows that had `before` of them; full chunks that need not be kept go into the border."""
        end = before + tokens
        done = max((end - self.keep) // self.chunk_size, 0) * self.chunk_size
        x, dt, B, C = (t[rows, :end] for t in self._ring)
        options = options | dict(chunk_size=self.chunk_size, return_state=True)
        parts, state = [], self.border[rows]
        for part in (slice(0, done), slice(done, end)):
            if part.start == part.stop:
                continue
            y, last = selective_scan(
                x[:, part], dt[:, part], A, B[:, part], C[:, part], D, initial_state=state, **options
            )
            parts.append(y)
            if part.stop == done:
                state = last
        if done:
            self.border[rows] = state
            for ring in self._ring:
                ring[rows, : end - done] = ring[rows, done:end].clone()
            for row in rows:
                self.counts[row] = end - done
        return torch.cat(parts, 1)[:, before:]
