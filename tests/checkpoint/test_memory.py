"""Loading in bounded memory: a rehearsal with every name of Super and small tensors, and the peak of a process."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import torch

import nvfp4_kernels as nk
from nvfp4_kernels.checkpoint import load, names
from nvfp4_kernels.checkpoint.files import Item, safetensors, write
from tests.oracles import checkpoints

# Super's layers, experts and MTP; everything else as narrow as it can be.
SUPER = nk.preset(
    "super-120b", hidden_size=32, num_attention_heads=2, head_dim=16, mamba_num_heads=8, mamba_head_dim=4, n_groups=2,
    ssm_state_size=16, moe_intermediate_size=16, moe_shared_expert_intermediate_size=32, moe_latent_size=16, vocab_size=64,
)  # fmt: skip


def test_rehearsal_of_super(tmp_path, monkeypatch):
    """All 41 layers of 512 experts, 8 of them NVFP4: each tensor is read once, from one open shard at a time."""
    with torch.device("meta"):
        model = nk.HybridModel(SUPER)
    shapes, weights = {}, {}
    for name, tensor in model.state_dict().items():
        if name.endswith("noise"):
            continue
        if not names.is_stack(name):
            shapes[name] = {"": (torch.bfloat16, tuple(tensor.shape))}
            continue
        stem, matrix = name.rsplit(".", 1)
        _, rows, cols = tensor.shape
        quantized = {
            "": (torch.uint8, (rows, cols // 2)), "_scale": (torch.float8_e4m3fn, (rows, cols // 16)),
            "_scale_2": (torch.float32, ()),
        }  # fmt: skip
        for e in range(512):
            whole = name.startswith("mtp.") or int(name.split(".")[2]) > 17
            shapes[f"{stem}.{e}.{matrix}.weight"] = {"": (torch.bfloat16, (rows, cols))} if whole else quantized
    ones = functools.cache(lambda dtype, shape: torch.ones(shape).to(dtype))
    items = [
        Item(name + end, dtype, shape, functools.partial(ones, dtype, shape))
        for name, parts in shapes.items()
        for end, (dtype, shape) in parts.items()
    ]
    assert len(items) == (8 * 3 + 32 + 1) * 1024 + 88 + 40 * 8 + 40 * 6 + 8 * 4 + 3 + 4 + 2 + 4 + 6
    step = -(-len(items) // 12)
    for i in range(12):
        part = items[i * step : (i + 1) * step]
        weights |= {item.name: f"model-{i + 1:05d}-of-00012.safetensors" for item in part}
        write(tmp_path / f"model-{i + 1:05d}-of-00012.safetensors", safetensors(part))
    checkpoints.write(tmp_path, SUPER.to_dict(), {}, hf_quant_config={"quantization": {"quant_algo": "NVFP4"}})
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))

    reads, opened, plain = [], [], load.Files.read

    def counting(self, piece):
        values = plain(self, piece)
        assert len(self._open) == 1
        opened.extend(shard for shard in self._open if not opened or opened[-1] != shard)
        reads.extend(entry.name for entry, _ in piece.parts.values())
        return values

    monkeypatch.setattr(load.Files, "read", counting)
    read = nk.HybridModel.from_pretrained(tmp_path)
    assert sorted(reads) == sorted(weights)  # each once
    assert [Path(shard).name for shard in opened] == sorted(set(weights.values()))
    assert read.backbone.layers[1].mixer.experts.up_proj.weight.shape == (512, 16, 8)
    assert not any(t.is_meta for t in [*read.parameters(), *read.buffers()])


PEAK = """
import contextlib, ctypes, gc, sys, torch
import nvfp4_kernels as nk
import safetensors.torch
def peak():  # of this process, where ru_maxrss would begin at that of the one which started it
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
nk.HybridModel.from_pretrained(sys.argv[2])  # for what torch imports at its first use
gc.collect()
with contextlib.suppress(OSError, AttributeError):  # what that has let go of is not there for the next, and no peak before it
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
before = peak()
model = nk.HybridModel.from_pretrained(sys.argv[1])
print(peak() - before, sum(t.nbytes for t in [*model.parameters(), *model.buffers()]))
"""


def test_peak_of_the_host(tmp_path):
    """The process grows by less than the model and one shard."""
    config = nk.preset("small", hybrid_override_pattern="EMEM", n_routed_experts=64, moe_latent_size=512)
    with torch.device("meta"):
        model = nk.HybridModel(config)
    model.to_empty(device="cpu").bfloat16().save_pretrained(tmp_path / "a", max_shard_bytes=20e6)
    files = [p.stat().st_size for p in (tmp_path / "a").glob("*.safetensors")]
    assert len(files) >= 5
    nk.HybridModel(nk.preset("tiny")).save_pretrained(tmp_path / "b")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "a"), str(tmp_path / "b")]
    grown, size = map(int, subprocess.check_output(command, cwd=Path(__file__).parents[2]).split())
    assert 1e8 < size < grown + 1e7  # it is the peak that was measured
    assert grown < size + max(files)
