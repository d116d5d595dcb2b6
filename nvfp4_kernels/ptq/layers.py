"""A checkpoint's model run layer by layer: each is read when its turn comes, given the whole text, and let go of.

What is held is one layer, the hidden states of the text, and one shard. What each layer is given, and so what it says, is to
the bit what a model in memory makes of the same batches.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from nvfp4_kernels.checkpoint.fit import EMBEDDINGS, fit
from nvfp4_kernels.checkpoint.load import fill, insert_layers
from nvfp4_kernels.checkpoint.source import Source
from nvfp4_kernels.model.hybrid import HybridModel
from nvfp4_kernels.ptq.calibrate import Amaxes, observe
from nvfp4_kernels.ptq.evaluate import Evaluation, Text, evaluate, windows

Watch = Callable[[int, int], None]  # how many layers are done, of how many


class Layers:
    """model: of `source`, in eval mode, on the meta device but for what is `loaded`. device: where that is computed.

    Raises CheckpointError as from_pretrained does.
    """

    def __init__(self, source: Source, device: torch.device):
        with torch.device("meta"):
            self.model = HybridModel(source.config).eval()
        self.fit, self.device = fit(self.model, source.entries, source.folder), device
        insert_layers(self.model, self.fit.kept, self.fit.problems)
        self._tied = source.config.tie_word_embeddings

    @contextlib.contextmanager
    def loaded(self, *modules: str) -> Iterator[None]:
        """Inside, these modules have their tensors, as from_pretrained would give them."""
        try:
            fill(self.model, self.fit, None, self.device, False, modules)
            yield
        finally:
            for module in modules:
                self.model.get_submodule(module).to("meta")
            if self._tied:
                self.model.lm_head.weight = self.model.backbone.embeddings.weight

    def hidden(self, batches: list[Tensor], watch: Watch) -> list[Tensor]:
        """What HybridModel.hidden gives of each of these, int64 [rows, length]."""
        backbone = self.model.backbone
        with self.loaded(EMBEDDINGS):
            states = [self.model.embed(ids.to(self.device)) for ids in batches]
        for number, layer in enumerate(backbone.layers):
            watch(number, len(backbone.layers))
            with self.loaded(f"backbone.layers.{number}"):
                for place, x in enumerate(states):
                    states[place] = layer(x)[0]
        watch(len(backbone.layers), len(backbone.layers))
        with self.loaded("backbone.norm_f"):
            return [backbone.norm_f(x) for x in states]

    def logits(self, states: list[Tensor]) -> Iterator[Tensor]:
        with self.loaded(EMBEDDINGS if self._tied else "lm_head"):
            for x in states:
                yield self.model.lm_head(x)

    def evaluate(self, text: Text, length: int, watch: Watch) -> Evaluation:
        """As ptq.evaluate, whose time is here that of reading too."""
        return evaluate(self.model, text, length, lambda batches: self.logits(self.hidden(batches, watch)))

    @torch.no_grad()
    def calibrate(self, ids: np.ndarray, length: int, watch: Watch) -> Amaxes:
        """As ptq.calibrate."""
        batches = [rows for rows, _ in windows(ids, min(length, len(ids) - 1), self.model.config.vocab_size)]
        with observe(self.model) as amaxes:
            states = self.hidden(batches, watch)
            for _ in self.logits(states):
                pass
            if self.model.mtp is not None:
                with self.loaded("mtp", EMBEDDINGS):
                    for ids, x in zip(batches, states, strict=True):
                        if ids.shape[1] > 1:
                            self.model.mtp(x[:, :-1], self.model.embed(ids[:, 1:].to(self.device)))
        amaxes.check()
        return amaxes
