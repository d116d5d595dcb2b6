"""Checkpoints between transformers' nemotron_h and ours, both ways: the same logits in fp32."""

import math

import pytest
import torch

import nvfp4_kernels as nk
from tests.oracles.checkpoints import BASE, CASES, randomize

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.models.nemotron_h")


def read_by_transformers(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, math.inf)  # its prefill clamps the step, its decoding does not
    return model


def assert_equal_logits(ours, theirs):
    ids = torch.randint(0, 96, (2, 21))
    with torch.no_grad():
        mine, reference = ours(ids), theirs(ids).logits
    assert reference.std() > 0.1
    torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", ["transformers", "published"])
@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_ours(case, layout, tmp_path):
    ours = randomize(nk.HybridModel(nk.HybridConfig(**(BASE | CASES[case]))))
    ours.save_pretrained(tmp_path / "out", layout=layout, max_shard_bytes=2e5)
    assert_equal_logits(ours, read_by_transformers(tmp_path / "out"))


@pytest.mark.parametrize("case", CASES)
def test_we_read_transformers(case, tmp_path):
    fields = nk.HybridConfig(**(BASE | CASES[case])).to_dict()
    config = transformers.NemotronHConfig(**fields, use_bias=fields["mamba_proj_bias"])
    theirs = randomize(transformers.NemotronHForCausalLM(config))
    theirs.save_pretrained(tmp_path / "out", max_shard_size="200KB")
    theirs = read_by_transformers(tmp_path / "out")
    if "mtp" in case:  # of which transformers keeps the config and drops the tensors
        with pytest.warns(UserWarning, match="no tensors of mtp"):
            ours = nk.HybridModel.from_pretrained(tmp_path / "out")
        assert ours.mtp is None
    else:
        ours = nk.HybridModel.from_pretrained(tmp_path / "out")
    assert_equal_logits(ours, theirs)
