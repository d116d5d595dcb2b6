"""Bytes of a training step of the experts, as benchmarks/experts_memory.py counts them, beside torch's own parts."""

import torch

from benchmarks import experts_memory


def test_a_step_keeps_the_formula_and_peaks_below_torch(monkeypatch):
    monkeypatch.setitem(experts_memory.SIZES, "small", (8, 2, 64, 96))  # experts, top_k, size, width
    torchs, bf16, nvfp4 = experts_memory.measured("small", 512, torch.device("cpu"))
    assert bf16["saved_bytes_a_token"] == 2 * 2 * 96  # the hidden values of two experts, in bf16
    assert nvfp4["saved_bytes_a_token"] <= 1.05 * 2 * (2 * 96 + (64 + 96) * 9 / 16)  # groups padded to blocks
    for ours in (bf16, nvfp4):
        assert ours["peak_bytes_a_token"] <= 0.8 * torchs["peak_bytes_a_token"]
