"""Quantizing from files to files: the same bytes as in memory, of one layer at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.checkpoint.huggingface import open_model
from nvfp4_kernels.checkpoint.save import save
from nvfp4_kernels.ptq.evaluate import Text
from nvfp4_kernels.ptq.quantize import Plan, quantize_model
from nvfp4_kernels.ptq.stream import Stream
from nvfp4_kernels.train.byte_level import tokenizer_json
from nvfp4_kernels.train.tokenizer import ByteTokenizer

PLANS = {
    "all": Plan("all", (("*", "w4a16"),)),
    "experts": Plan("experts", (("*.experts.*", "w4a16"),), None, "mse"),
    "some": Plan("some", (("*.down_proj", "w4a16"), ("*.up_proj", "w4a16"), ("*.in_proj", "bf16")), None, "max", "mae"),
    "none": Plan("none", (("*", "bf16"),)),
}
RULES = (("*.experts.*", "nvfp4"), ("*.[kq]_proj", "fp8"), ("*.in_proj", "nvfp4"))
CALIBRATED = {
    "calibrated": Plan("calibrated", RULES, kv_cache=True),
    "evaluated": Plan("evaluated", (("*.experts.*", "w4a16"),)),
}
SHARD = 20_000


def written(model, folder, read=None):
    quantized = any(hasattr(module, "weight_scale") for module in model.modules())
    save(model, folder, "modelopt" if quantized else "published", SHARD, None, read)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def checkpoint(make_model, tmp_path):
    """checkpoint(layout, dtype, **changes): its folder, of several shards, biases and cache scales among the tensors."""

    def make(layout="published", dtype=torch.bfloat16, **changes):
        model = make_model("ME*-E", num_nextn_predict_layers=1, mlp_bias=True, torch_dtype="bfloat16", **changes)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                if name.endswith("bias"):
                    tensor.add_(0.125)
        model.backbone.layers[2].mixer.k_proj.register_buffer("k_scale", torch.tensor(0.75))
        model.save_pretrained(tmp_path / "a", layout, SHARD, dtype)
        (tmp_path / "a" / "tokenizer.json").write_text("{}")
        return tmp_path / "a"

    return make


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(
    "source", [{}, dict(layout="transformers"), dict(dtype=None), dict(tie_word_embeddings=True)], ids=str
)
def test_the_same_files_as_in_memory(checkpoint, tmp_path, plan, source):
    folder = checkpoint(**source)
    model = nk.HybridModel.from_pretrained(folder)
    report = quantize_model(model, plan)
    stream = Stream(open_model(folder), plan, "cpu")
    assert all(tensor.is_meta for tensor in [*stream.model.parameters(), *stream.model.buffers()])
    files = written(stream.model, tmp_path / "streamed", stream.read)
    assert files == written(model, tmp_path / "in memory") and len(files) > 4
    assert stream.report(tmp_path / "streamed").to_dict() == report.to_dict()


def without_times(report):
    return {
        key: {k: v for k, v in value.items() if "second" not in k} if isinstance(value, dict) else value
        for key, value in report.to_dict().items()
    }


@pytest.mark.parametrize("plan", CALIBRATED.values(), ids=CALIBRATED)
@pytest.mark.parametrize("source", [{}, dict(layout="transformers", dtype=None, tie_word_embeddings=True)], ids=str)
def test_texts_say_the_same_as_in_memory(checkpoint, ids, tmp_path, plan, source):
    """Input scales, scales of a cache, perplexities: to the bit, of batches of several windows and a rest."""
    texts = Text(ids, 61, "calibration"), Text(ids[::-1], 60, "text")
    texts = texts if plan.kv_cache else (None, texts[1])
    folder = checkpoint(**source)
    model = nk.HybridModel.from_pretrained(folder)
    report = quantize_model(model, plan, *texts, 16)
    stream = Stream(open_model(folder), plan, "cpu", *texts, 16)
    files = written(stream.model, tmp_path / "streamed", stream.read)
    assert files == written(model, tmp_path / "in memory") and len(files) > 4
    assert without_times(stream.report(tmp_path / "streamed")) == without_times(report)
    assert all(tensor.is_meta for tensor in stream.model.parameters())


def test_each_tensor_is_read_once_and_each_layer_made_once(checkpoint, tmp_path, monkeypatch):
    folder, reads, layers = checkpoint(), [], []
    stream = Stream(open_model(folder), PLANS["all"], "cpu")
    read, quantized = stream._reader._files.read, stream._quantized
    monkeypatch.setattr(stream._reader._files, "read", lambda piece: reads.append(piece[:3]) or read(piece))
    monkeypatch.setattr(stream, "_quantized", lambda target: layers.append(target.name) or quantized(target))
    written(stream.model, tmp_path / "b", stream.read)
    assert (
        len(set(reads)) == len(reads) and len(reads) == len(open_model(folder).entries) - 1
    )  # but the scale of a cache
    assert len(set(layers)) == len(layers) == len(stream._targets)


def test_errors_are_those_of_quantizing_in_memory(checkpoint, tmp_path):
    folder = checkpoint()
    for rules, message in (
        ((("*.in_proj", "fp8"),), "calibrate: got no text, and backbone.layers.0.mixer.in_proj=fp8"),
        ((("*.nothing", "w4a16"),), "matches no layer"),
    ):
        with pytest.raises(ValueError, match=message):
            Stream(open_model(folder), Plan("p", rules), "cpu")
    stream = Stream(open_model(folder), PLANS["experts"], "cpu")
    written(stream.model, tmp_path / "b", stream.read)
    with pytest.raises(ValueError, match="model: got backbone.layers.1.mixer.experts.up_proj, quantized already"):
        Stream(open_model(tmp_path / "b"), PLANS["experts"], "cpu")
    model = nk.HybridModel.from_pretrained(folder)
    with torch.no_grad():
        model.backbone.layers[1].mixer.experts.down_proj[2, 3, 4] = float("nan")
    model.save_pretrained(folder)
    stream = Stream(open_model(folder), PLANS["experts"], "cpu")
    with pytest.raises(ValueError, match="backbone.layers.1.mixer.experts.down_proj: weight: got NaN or infinity"):
        written(stream.model, tmp_path / "c", stream.read)
    assert not (tmp_path / "c").exists() and not list(tmp_path.glob(".writing*"))


PEAK = """
import sys
from nvfp4_kernels.cli import main as cli
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
text = sys.argv[3]
arguments = ["quantize", "--pattern", "*.experts.*=nvfp4", "--calibrate", text, "--text", text, "--length", "64", "--model"]
assert cli.main([*arguments, sys.argv[1], "--out", sys.argv[2] + "-first"]) == 0  # for what is imported at its first use
before = peak()
assert cli.main([*arguments, sys.argv[2], "--out", sys.argv[2] + "-quantized"]) == 0
print(peak() - before)
"""


def test_peak_of_the_host(tmp_path):
    """The command, texts included, grows by less than a shard and a layer, of a checkpoint of many."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("matplotlib")
    wide = dict(n_routed_experts=16, moe_latent_size=512, moe_intermediate_size=512, vocab_size=260)
    for name, config in (
        ("small", nk.preset("tiny", hybrid_override_pattern="E", vocab_size=260)),
        ("large", nk.preset("small", hybrid_override_pattern="E" * 6, **wide)),
    ):
        with torch.device("meta"):
            model = nk.HybridModel(config)
        model = model.to_empty(device="cpu").bfloat16()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.01)
        model.save_pretrained(tmp_path / name, max_shard_bytes=20e6)
        (tmp_path / name / "tokenizer.json").write_text(tokenizer_json(ByteTokenizer(258)))
    files = [path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors")]
    layer = 16 * 512 * 512 * 2
    (tmp_path / "text").write_text("a text to run through all of it, " * 8)
    command = [sys.executable, "-c", PEAK, *(str(tmp_path / name) for name in ("small", "large", "text"))]
    # what is freed goes back to the system: left alone, the allocator's thresholds move with what it has met
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    grown = int(done.stdout.split()[-1])
    assert sum(files) > 1e8 and grown < max(files) + 2 * layer + 16e6, (grown, sum(files))
