"""A multi-token-prediction block for a model that was trained without one, to draft with: the block alone learns.

Nemotron 3's "MTP healing" trains so, after the model has changed: its head on the model's own hidden states, the rest frozen.
"""

import time

from nvfp4_kernels.model.hybrid import HybridModel
from nvfp4_kernels.train.corpus import Corpus
from nvfp4_kernels.train.loop import Trainer
from nvfp4_kernels.train.optimizer import build_optimizer
from nvfp4_kernels.train.schedule import Schedule
from nvfp4_kernels.train.settings import Settings
from nvfp4_kernels.train.setup import split

PATTERN = "-"
MEASURED = 5  # steps after which the pace tells how many there will be


def with_drafting(model: HybridModel, settings: Settings, corpus: Corpus, seconds: float) -> HybridModel:
    """A copy of `model` with an MTP block, trained for about `seconds` on the batches that `settings` name.

    One depth: drafts further on come of the same block, from its own states. The block is one MLP layer: beside a model of
    seven layers attention and experts cost more time for each draft than their better drafts give back.
    """
    config = model.config.replace(num_nextn_predict_layers=1, mtp_num_depths=1, mtp_hybrid_override_pattern=PATTERN)
    made = HybridModel(config, model.recipe)
    made.to(model.lm_head.weight.device).load_state_dict(model.state_dict(), strict=False)
    made.train_only(["mtp.*"])
    data, _ = split(settings, corpus)
    trainer = Trainer(
        made, data, build_optimizer(made, settings.lr, settings.weight_decay), Schedule(settings.lr, None)
    )
    begun = time.perf_counter()
    while trainer.schedule.steps is None or trainer.step < trainer.schedule.steps:
        trainer.run_step()
        trainer.check_patience()
        if trainer.step == MEASURED:
            steps = max(MEASURED, round(seconds * MEASURED / (time.perf_counter() - begun)))
            trainer.schedule = Schedule(settings.lr, steps, decay=steps - MEASURED)
    return made.eval()
