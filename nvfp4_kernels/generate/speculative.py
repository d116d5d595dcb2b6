"""Speculative decoding: the MTP block drafts, the model reads all drafts in one pass, and what it would have said itself stays.

Accepting a draft d with probability min(1, p(d) / q(d)), q being what it was drawn from and p the model's own, and drawing
from max(p - q, 0) where it is refused, gives exactly the distribution p. Source: Leviathan et al., arXiv 2211.17192. A greedy
sequence has all of p at one token and of q at another or the same: the rule then says "keep the draft if it is the model's
own choice", with nothing special about it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nvfp4_kernels.generate.sample import ACCEPT, DRAFT, INSTEAD, TOKEN, Shaper, draw
from nvfp4_kernels.generate.state import Pool
from nvfp4_kernels.nn.attention import Attention
from nvfp4_kernels.nn.moe import MLP, MoE


@dataclass
class Acceptance:
    """passes: of the model over drafts, for one sequence each. tokens: that came of them, the model's own one included."""

    passes: int = 0
    tokens: int = 0
    by_depth: list[int] = field(default_factory=list)  # passes in which at least that many drafts were accepted

    @property
    def mean_length(self) -> float:
        return self.tokens / max(self.passes, 1)

    def count(self, accepted: int) -> None:
        self.passes += 1
        self.tokens += accepted + 1
        for depth in range(accepted):
            self.by_depth[depth] += 1


class Drafter:
    """The MTP block with keys and values of its own. Of a sequence with n tokens through the model it has seen at most n - 1:
    position t pairs the model's hidden state there with the token that follows, and the last one's is yet to be drawn.
    """

    def __init__(self, model, slots: int, depth: int):
        self.model, self.depth = model, depth
        if model.mtp is None:
            raise ValueError(
                "speculative: got a model without an MTP block; allowed: one with num_nextn_predict_layers 1, or False"
            )
        if not all(isinstance(block.mixer, (Attention, MoE, MLP)) for block in model.mtp.layers):
            raise ValueError(
                f"speculative: got an MTP block {model.config.mtp_hybrid_override_pattern!r}; allowed: *, E and - layers"
            )
        self.pool = Pool(
            model.mtp.layers, slots, model.config.dtype, torch.float32, model.backbone.embeddings.weight.device
        )
        self.acceptance = Acceptance(by_depth=[0] * depth)

    def read(self, slots: list[int], hidden: list[Tensor], following: list[list[int]]) -> None:
        """Take in prompts: hidden states [tokens, hidden] of each slot's next tokens, and the tokens one further on."""
        counts = [len(tokens) for tokens in following]
        ids = torch.tensor([[token for tokens in following for token in tokens]], device=self.pool.device)
        state = self.pool.begin(slots, counts, packed=True)
        self.model.mtp(torch.cat(hidden)[None], self.model.embed(ids), None, state)

    def propose(self, requests: list, shaper: Shaper) -> tuple[list[list[int]], Tensor]:
        """`depth` drafts for each request, and the probabilities they were drawn from, [requests, depth, vocab].

        A request brings `hidden`, the model's states at its last tokens that the block has not seen, and its tokens, of
        which the last one is not in any state yet.
        """
        slots, fresh = [r.slot for r in requests], [len(r.hidden) for r in requests]
        starts, most = [self.pool.lengths[slot] for slot in slots], max(fresh)
        # Rows of equal length: what is behind a shorter one's end is seen by nothing and overwritten by its next tokens.
        hidden = torch.nn.utils.rnn.pad_sequence([r.hidden for r in requests], batch_first=True)
        ids = [r.last(n) + [0] * (most - n) for r, n in zip(requests, fresh, strict=True)]
        out = self._advance(slots, hidden, ids, most)
        out = out[torch.arange(len(slots)), torch.tensor(fresh) - 1][:, None]
        for slot, start, n in zip(slots, starts, fresh, strict=True):
            self.pool.truncate(slot, start + n)
        drafts, proposals = [[] for _ in requests], []
        seen = seen_tokens(requests, shaper)
        for depth in range(self.depth):
            if depth:
                out = self._advance(slots, out, [[d[-1]] for d in drafts], 1)
                mark(seen, [d[-1] for d in drafts])
            q = shaper.probabilities(self.model.lm_head(out)[:, 0], seen)
            proposals.append(q)
            tokens = draw(q, [r.draws.at(r.position + depth, DRAFT) for r in requests])
            for row, token in zip(drafts, tokens, strict=True):
                row.append(token)
        for slot, start, n in zip(slots, starts, fresh, strict=True):
            self.pool.truncate(slot, start + n)  # drafts leave no trace: their hidden states were not the model's
        return drafts, torch.stack(proposals, 1)

    def _advance(self, slots: list[int], hidden: Tensor, ids: list[list[int]], count: int) -> Tensor:
        state = self.pool.begin(slots, [count] * len(slots))
        return self.model.mtp(hidden, self.model.embed(torch.tensor(ids, device=self.pool.device)), None, state)[0]


def judge(requests: list, drafts: list[list[int]], q: Tensor, p: Tensor) -> list[list[int]]:
    """The tokens that each request gets: accepted drafts, and one of the model's own.

    q: [requests, depth, vocab], what the drafts were drawn from. p: [requests, depth + 1, vocab], the model's own.
    """
    depth, at = q.shape[1], torch.tensor(drafts, device=q.device)[:, :, None]
    ratios = (p[:, :depth].gather(2, at) / q.gather(2, at))[..., 0].tolist()  # q of what was drawn is above 0
    kept = []
    for request, row in zip(requests, ratios, strict=True):
        accepted = 0
        while accepted < depth and request.draws.at(request.position + accepted, ACCEPT) < row[accepted]:
            accepted += 1
        kept.append(accepted)
    rows, places = torch.arange(len(requests), device=q.device), torch.tensor(kept, device=q.device)
    rest, refused = p[rows, places], (places < depth)[:, None]
    left = (rest - q[rows, places.clamp(max=depth - 1)]).clamp(min=0)
    # Nothing is left where p and q are equal but for rounding; a refusal is then as rare as the rounding is small.
    rest = torch.where(refused & (left.sum(-1, keepdim=True) > 0), left, rest)
    uniforms = [
        request.draws.at(request.position + n, INSTEAD if n < depth else TOKEN)
        for request, n in zip(requests, kept, strict=True)
    ]
    own = draw(rest, uniforms)
    return [row[:n] + [token] for row, n, token in zip(drafts, kept, own, strict=True)]


def seen_tokens(requests: list, shaper: Shaper) -> Tensor | None:
    """bool [requests, vocab], a copy; None where no request asks for a penalty."""
    if not shaper.penalized:
        return None
    any_row = next(r.seen for r in requests if r.seen is not None)  # will do for those without a penalty
    return torch.stack([any_row if r.seen is None else r.seen for r in requests])


def mark(seen: Tensor | None, tokens: list[int]) -> None:
    """Add a token to each row's."""
    if seen is not None:
        seen[torch.arange(len(tokens)), torch.tensor(tokens)] = True
