"""Decoding that gives, bit for bit, what one scan over the whole sequence gives.

state_update multiplies the state by one decay a token, a scan by the decays of a chunk: the same numbers, rounded
differently. Whoever trains on what a model generates wants them equal. So the state is kept at the border of a chunk alone,
and the inputs since then in a ring, which the scan itself runs over again for each new token. The native backend's scan keeps
the contract that this needs: the bits of a token's y depend on the state that enters its chunk and the tokens of the chunk up
to its own, on nothing else.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nvfp4_kernels.ops._check import floating_point, require
from nvfp4_kernels.ops.selective_scan.op import selective_scan


class ReplayState:
    """The state of a scan over rows of different lengths, all in the same place of the model.

    border: fp32 [batch, heads, head_dim, state], of the tokens before the ring: a multiple of chunk_size for each row.
    counts: tokens in each row's ring. keep: how many of the last tokens `rollback` can always take back, which is what
    speculative decoding needs. Memory a row: the border and chunk_size + keep tokens of x, dt, B and C.
    """

    def __init__(self, border: Tensor, chunk_size: int, keep: int = 0):
        floating_point("border", border)
        require(border.dtype in (torch.float32, torch.float64), "border", border.dtype, "float32, float64", TypeError)
        require(border.dim() == 4, "border", f"shape {list(border.shape)}", "[batch, heads, head_dim, state]")
        require(chunk_size >= 1, "chunk_size", chunk_size, "at least 1")
        require(keep >= 0, "keep", keep, "0 or more")
        self.border, self.chunk_size, self.keep = border, chunk_size, keep
        self.counts = [0] * border.shape[0]
        self._ring: list[Tensor] | None = None  # x, dt, B, C: [batch, tokens, ...]

    def advance(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        *,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = True,
        dt_limit: tuple[float, float] = (0.0, math.inf),
    ) -> Tensor:
        """y of the next tokens, as many for each row: the bits of selective_scan over all so far.

        Arguments as selective_scan's; a gate z is the caller's to put behind it, element by element. Not differentiable.
        Raises TypeError or ValueError naming the argument; what is refused leaves no trace.
        """
        floating_point("x", x)
        require(x.dim() == 4, "x", f"shape {list(x.shape)}", "[batch, tokens, heads, head_dim]")
        batch, tokens = x.shape[:2]
        require(batch == len(self.counts), "x", f"{batch} rows", f"{len(self.counts)}, as border")
        for name, t in (("dt", dt), ("B", B), ("C", C)):
            floating_point(name, t)
            require(t.shape[:2] == x.shape[:2], name, f"shape {list(t.shape)}", f"[{batch}, {tokens}] and more, as x")
        options = dict(dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, chunk_size=self.chunk_size)
        with torch.no_grad():
            starts, ring = list(self.counts), self._with(dict(x=x, dt=dt, B=B, C=C))
            ys = torch.empty_like(x, memory_format=torch.contiguous_format)
            for count in sorted(set(starts)):  # rows that stand at the same place go together
                rows = [row for row in range(batch) if starts[row] == count]
                ys[rows] = self._scan(ring, rows, count, tokens, A, D, options)
            self._ring = ring
            return ys

    def rollback(self, tokens: int | Sequence[int]) -> None:
        """Forget each row's last `tokens` (one number, or one for each row), as if they had never come.

        Raises ValueError beyond what the ring still holds; `keep` tokens always are.
        """
        tokens = [tokens] * len(self.counts) if isinstance(tokens, int) else [int(back) for back in tokens]
        require(
            len(tokens) == len(self.counts), "tokens", f"{len(tokens)} numbers", f"{len(self.counts)}, one for each row"
        )
        for row, (count, back) in enumerate(zip(self.counts, tokens, strict=True)):
            require(0 <= back <= count, "tokens", f"{back} for row {row}", f"0 to {count}, the tokens in its ring")
        self.counts = [count - back for count, back in zip(self.counts, tokens, strict=True)]

    def _with(self, new: dict[str, Tensor]) -> list[Tensor]:
        """The ring with the new tokens behind those of each row."""
        held = self._ring or [t[:, :0] for t in new.values()]
        for (name, t), old in zip(new.items(), held, strict=True):
            fits = t.dtype == old.dtype and t.shape[2:] == old.shape[2:]
            require(
                fits, name, f"{t.dtype} {list(t.shape)}", f"{old.dtype} {[*t.shape[:2], *old.shape[2:]]}, as before"
            )
        tokens = new["x"].shape[1]
        size = max(self.counts, default=0) + tokens
        room = max(-(-size // self.chunk_size) * self.chunk_size, held[0].shape[1])
        ring = []
        for t, old in zip(new.values(), held, strict=True):
            if old.shape[1] < room:
                old = torch.cat([old, old.new_zeros(len(t), room - old.shape[1], *t.shape[2:])], 1)
            for row, count in enumerate(self.counts):
                old[row, count : count + tokens] = t[row]
            ring.append(old)
        return ring

    def _scan(self, ring: list[Tensor], rows: list[int], before: int, tokens: int, A, D, options) -> Tensor:
        """y of the last `tokens` of rows that had `before` of them; full chunks that need not be kept go into the border."""
        end = before + tokens
        done = max((end - self.keep) // self.chunk_size, 0) * self.chunk_size
        x, dt, B, C = (t[rows, :end] for t in ring)
        ys, state = [x[:, :0]], self.border[rows]
        for part in (slice(0, done), slice(done, end)):
            if part.start == part.stop:
                continue
            y, last = selective_scan(
                x[:, part], dt[:, part], A, B[:, part], C[:, part], D, initial_state=state, return_state=True, **options
            )
            ys.append(y)
            if part.stop == done:
                state = last
        if done:
            self.border[rows] = state
            for t in ring:
                t[rows, : end - done] = t[rows, done:end].clone()
        for row in rows:
            self.counts[row] = end - done
        return torch.cat(ys, 1)[:, before:]
