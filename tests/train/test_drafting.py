"""The block that drafts is trained alone: it learns, everything else stays bit for bit."""

import torch

from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.model.hybrid import HybridModel
from nvfp4_kernels.train import drafting
from nvfp4_kernels.train.corpus import load_corpus
from nvfp4_kernels.train.settings import Settings
from nvfp4_kernels.train.tokenizer import ByteTokenizer


def test_the_block_learns_and_the_model_stays(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    config = HybridConfig(
        "M*", vocab_size=260, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=64, mamba_num_heads=2, mamba_head_dim=16, ssm_state_size=16, n_groups=1, chunk_size=16,
    )  # fmt: skip
    model = HybridModel(config, "nvfp4")
    before = {name: p.clone() for name, p in model.named_parameters()}
    settings = Settings(batch=2, length=32, lr=1e-2, validation=0.1, seed=1)
    corpus = load_corpus(tmp_path / "text.txt", ByteTokenizer(), 260)
    reports, run_step = [], drafting.Trainer.run_step

    def watched(trainer):
        reports.append(run_step(trainer))
        return reports[-1]

    monkeypatch.setattr(drafting.Trainer, "run_step", watched)
    monkeypatch.setattr(drafting, "MEASURED", 40)
    made = drafting.with_drafting(model, settings, corpus, 0.0)
    assert len(reports) == 40 and not made.training
    assert reports[-1].losses["mtp"] < 0.9 * reports[0].losses["mtp"]
    parameters = dict(made.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in before.items())
    assert {name.split(".")[0] for name in set(parameters) - set(before)} == {"mtp"} and model.mtp is None
    ids = torch.randint(0, 256, (1, 8))
    assert made.generate(ids, 5, speculative=2).shape == (1, 13)
