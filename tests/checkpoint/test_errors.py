"""Checkpoints that are not what they should be: one clear error, and saves that leave what was there."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nvfp4_kernels as nk
from nvfp4_kernels.checkpoint import files
from nvfp4_kernels.checkpoint.fit import SHOWN
from tests.oracles.checkpoints import BASE, drawn_fp8, drawn_nvfp4, published, randomize, write

TINY = BASE | dict(hybrid_override_pattern="ME", vocab_size=32, n_routed_experts=4, num_experts_per_tok=2)
UP = "backbone.layers.1.mixer.experts.{}.up_proj"
SHARED = "backbone.layers.1.mixer.shared_experts.up_proj"


@pytest.fixture
def model():
    return randomize(nk.HybridModel(nk.HybridConfig(**TINY)))


@pytest.fixture
def parts(model):
    return model.config.to_dict(), published(model)


def refusal(folder) -> str:
    with pytest.raises(ValueError) as caught:
        nk.HybridModel.from_pretrained(folder)
    return str(caught.value)


def test_all_that_does_not_fit_in_one_error(tmp_path, parts):
    config, tensors = parts
    tensors["backbone.layers.0.mixer.in_projj.weight"] = tensors.pop("backbone.layers.0.mixer.in_proj.weight")
    tensors[f"{UP.format(3)}s.weight"] = tensors.pop(f"{UP.format(3)}.weight")
    tensors[f"{UP.format(4)}.weight"] = torch.zeros(32, 48)  # there are four experts
    tensors["backbone.norm_f.weight"] = torch.zeros(47)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].long()
    tensors["model.layers.0.norm.weight"] = tensors["backbone.layers.0.norm.weight"].clone()
    write(tmp_path, config, tensors)
    lines = refusal(tmp_path).splitlines()
    assert "does not fit its config.json" in lines[0]
    for count in ("3 unknown", "2 missing", "1 misshaped", "1 of a wrong dtype", "1 twice"):
        assert count in lines[0]
    text = "\n".join(lines[1:])
    near = "backbone.layers.0.mixer.in_proj.weight"
    assert f"unknown: backbone.layers.0.mixer.in_projj.weight [166, 48] (nearest: {near})" in text
    assert f"unknown: {UP.format(3)}s.weight [32, 48] (nearest: {UP.format(3)}.weight)" in text
    assert f"unknown: {UP.format(4)}.weight [32, 48] (nearest: {UP.format(0)}.weight)" in text
    assert f"missing: {near}" in text and f"missing: {UP.format(3)}.weight" in text
    assert "misshaped: backbone.norm_f.weight [47], wanted [48]" in text
    assert "of a wrong dtype: lm_head.weight I64, wanted F32 or BF16 or F16 or F64" in text
    assert "twice: model.layers.0.norm.weight and backbone.layers.0.norm.weight" in text or "twice: backbone" in text
    config, tensors = parts
    tensors["model.layers.1.mixer.experts.up_proj"] = torch.zeros(4, 32, 48)
    write(tmp_path, config, tensors)
    assert "twice: " in refusal(tmp_path)


def test_long_lists_are_cut(tmp_path, parts):
    config, tensors = parts
    write(tmp_path, config | {"n_routed_experts": 16}, tensors)
    text = refusal(tmp_path)
    assert "24 missing" in text and f"missing: and {24 - SHOWN} more" in text
    assert "2 misshaped" in text  # the router's weight and bias
    assert len(text.splitlines()) == 1 + SHOWN + 1 + 2


QUANTIZATION = {
    "gptq": ({"quant_method": "gptq"}, "quant_method: got 'gptq'; allowed: modelopt, compressed-tensors"),
    "algorithm": ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, "quant_algo: got 'MXFP8'; allowed: NVFP4"),
    "mixed": (
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "W4A16_AWQ"}}},
        "quant_algo: got 'W4A16_AWQ'",
    ),
    "cache": ({"quant_algo": "NVFP4", "kv_cache_scheme": "NVFP4"}, "kv_cache_quant_algo: got 'NVFP4'; allowed: FP8, or none"),
    "cache of integers": (
        {"quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8, "type": "int"}}, "kv_cache_quant_algo: got '8-bit int'"
    ),
    "group size": ({"quant_algo": "NVFP4", "group_size": 32}, "group_size: got 32; allowed: 16"),
    "format": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": {}}},
        "format: got 'pack-quantized' in g; allowed: nvfp4-pack-quantized",
    ),
    "strategy": (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
         "config_groups": {"g": {"weights": {"num_bits": 8}}}},
        "num_bits: got 8 for the weights of g; allowed: 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", QUANTIZATION)
def test_quantization_that_cannot_be_read(case, tmp_path, parts):
    quantization, message = QUANTIZATION[case]
    write(tmp_path, parts[0] | {"quantization_config": quantization}, parts[1])
    assert message in refusal(tmp_path)


def test_config_of_another_model(tmp_path, parts):
    write(tmp_path, parts[0] | {"model_type": "llama"}, parts[1])
    assert "config.json: model_type: got 'llama'; allowed: 'nemotron_h'" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is no JSON" in refusal(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "config.json does not exist" in refusal(tmp_path)


def test_files_that_are_missing_cut_or_no_safetensors(tmp_path, parts):
    write(tmp_path / "a", *parts, shards=3)
    shard = tmp_path / "a/model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    for size in (len(whole) - 1, 100, 8, 3):
        shard.write_bytes(whole[:size])
        assert "00002-of-00003" in refusal(tmp_path / "a") and "cut short" in refusal(tmp_path / "a")
    shard.write_bytes(whole + b"x")
    assert "cut short or grown" in refusal(tmp_path / "a")
    shard.write_bytes(whole[:8] + b"[" + whole[9:])
    assert "its header is damaged" in refusal(tmp_path / "a")
    shard.write_bytes(whole.replace(b"F32", b"F64", 1))
    assert "00002-of-00003" in refusal(tmp_path / "a") and "is no safetensors file" in refusal(tmp_path / "a")
    shard.unlink()
    assert "lacks 1 of the 3 shards that its index names: model-00002" in refusal(tmp_path / "a")
    shard.write_bytes(whole)
    index = tmp_path / "a/model.safetensors.index.json"
    text = index.read_text()
    index.write_text(text.replace("model-00001", "../model-00001"))
    assert "allowed: names of files in this folder" in refusal(tmp_path / "a")
    index.write_text("[]")
    assert "index.json: got a list" in refusal(tmp_path / "a")
    index.write_text("{}")
    assert "has no weight_map" in refusal(tmp_path / "a")
    index.unlink()
    assert "holds 3 shards and no model.safetensors.index.json" in refusal(tmp_path / "a")


def test_nothing_is_unpickled(tmp_path, parts):
    class Trap:
        def __reduce__(self):
            return Path.write_text, (tmp_path / "sprung", "x")

    (tmp_path / "config.json").write_text(json.dumps(parts[0]))
    torch.save({"a": Trap()}, tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin, a pickle" in refusal(tmp_path) and "do: have it converted" in refusal(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_folders_that_hold_nothing(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none")
    assert "holds no *.safetensors" in refusal(tmp_path)
    (tmp_path / "file").write_text("")
    assert "is a file; allowed: the folder" in refusal(tmp_path / "file")
    (tmp_path / "run.json").write_text("{}")
    assert "holds no snapshot yet" in refusal(tmp_path)


BAD_SCALES = {
    "NaN block": ("weight_scale", lambda t: t.view(torch.uint8).index_fill_(0, torch.tensor([2]), 0x7F)),
    "negative block": ("weight_scale", lambda t: t.view(torch.uint8).index_fill_(0, torch.tensor([2]), 0xA0)),
    "NaN global": ("weight_scale_2", lambda t: t.fill_(float("nan"))),
    "infinite input": ("input_scale", lambda t: t.fill_(float("inf"))),
    "negative FP8": ("weight_scale", lambda t: t.fill_(-1.0)),
}


@pytest.mark.parametrize("case", BAD_SCALES)
def test_scales_that_cannot_be(case, tmp_path, parts):
    config, tensors = parts
    draw = drawn_fp8 if "FP8" in case else drawn_nvfp4
    module = SHARED
    drawn = draw(*tensors.pop(f"{module}.weight").shape, torch.Generator().manual_seed(1))
    part, spoil = BAD_SCALES[case]
    spoil(drawn[part])
    write(tmp_path, config, tensors | {f"{module}.{name}": t for name, t in drawn.items()})
    assert f"with NaN, infinite or negative scales: {module}.{part}" in refusal(tmp_path)
    if part != "input_scale":
        with pytest.raises(ValueError, match="negative scales"):
            nk.HybridModel.from_pretrained(tmp_path, quantized="dequantize")


def test_a_block_scale_of_minus_zero_is_zero(tmp_path, parts):
    config, tensors = parts
    drawn = drawn_nvfp4(*tensors.pop(f"{SHARED}.weight").shape, torch.Generator().manual_seed(1))
    drawn["weight_scale"].view(torch.uint8)[0, 1] = 0x80
    write(tmp_path, config, tensors | {f"{SHARED}.{name}": t for name, t in drawn.items()})
    kept = nk.HybridModel.from_pretrained(tmp_path).get_submodule(SHARED).weight_scale.view(torch.uint8)
    assert kept[0, 1] == 0 and torch.equal(kept[1:], drawn["weight_scale"].view(torch.uint8)[1:])


def test_quantized_matrix_without_its_scales(tmp_path, parts):
    config, tensors = parts
    tensors[f"{SHARED}.weight"] = torch.zeros(48, 24, dtype=torch.uint8)
    write(tmp_path, config, tensors)
    assert f"missing: {SHARED}.weight_scale_2" in refusal(tmp_path)
    tensors["backbone.embeddings.weight"] = torch.zeros(32, 24, dtype=torch.uint8)  # no matrix of a linear layer
    write(tmp_path, config, tensors)
    assert "misshaped: backbone.embeddings.weight [32, 24], wanted [32, 48]" in refusal(tmp_path)


def test_arguments(tmp_path, model):
    for keywords, message in (
        (dict(dtype=torch.int8), "dtype: got torch.int8; allowed: None, torch.float32"),
        (dict(quantized="yes"), "quantized: got 'yes'; allowed: 'keep', 'dequantize'"),
    ):
        with pytest.raises(ValueError, match=message):
            nk.HybridModel.from_pretrained(tmp_path, **keywords)
    for keywords, message in (
        (dict(layout="gguf"), "layout: got 'gguf'; allowed: published, transformers, modelopt"),
        (dict(dtype=torch.int8), "dtype: got torch.int8"),
        (dict(max_shard_bytes=0), "max_shard_bytes: got 0; allowed: more than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "out", **keywords)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("before", [True, False])
def test_full_disk_leaves_what_was_there(code, before, tmp_path, model, monkeypatch):
    if before:
        model.save_pretrained(tmp_path / "a")
    known = tree(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.zero_()

    def stingy(path, parts, plain=files.write):
        if "00002" in path.name:
            path.write_bytes(b"half")
            raise OSError(code, os.strerror(code))
        return plain(path, parts)

    monkeypatch.setattr("nvfp4_kernels.checkpoint.save.write", stingy)
    with pytest.raises(ValueError, match="its disk is full" if code == errno.ENOSPC else "cannot be written"):
        model.save_pretrained(tmp_path / "a", max_shard_bytes=20_000)
    assert tree(tmp_path) == known


def test_rename_that_fails_is_taken_back(tmp_path, model, monkeypatch):
    model.save_pretrained(tmp_path / "a")
    known = tree(tmp_path)

    def fails(self, target, plain=Path.rename):
        if self.name == ".writing-a":
            raise OSError(errno.EIO, "broken")
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(ValueError, match="broken"):
        model.save_pretrained(tmp_path / "a", "transformers")
    assert tree(tmp_path) == known


def test_killed_while_writing(tmp_path, model):
    model.save_pretrained(tmp_path / "a")
    known = tree(tmp_path / "a")
    code = """
import os, signal, sys
import nvfp4_kernels as nk
from nvfp4_kernels.checkpoint import save
plain = save.write
def write(path, parts):
    if "00003" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(path, parts)
save.write = write
model = nk.HybridModel.from_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[1], max_shard_bytes=20_000)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / ".writing-a").exists() and tree(tmp_path / "a") == known
    model.save_pretrained(tmp_path / "a", "transformers")  # clears away what the killed one left
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_over_a_checkpoint_and_not_over_anything_else(tmp_path, model):
    model.save_pretrained(tmp_path / "a", max_shard_bytes=20_000)
    (tmp_path / "a/README.md").write_text("mine")
    (tmp_path / "a/tokenizer.json").write_text("{}")
    (tmp_path / "a/plots").mkdir()
    (tmp_path / "a/plots/x.png").write_text("mine too")
    for again in (nk.HybridModel.from_pretrained(tmp_path / "a"), model):  # one knows of the tokenizer, one does not
        again.save_pretrained(tmp_path / "a", "transformers")
        known = {"README.md", "plots/x.png", "tokenizer.json"}
        assert set(tree(tmp_path / "a")) == known | {"config.json", "model.safetensors"}  # no old shard, no old index
    (tmp_path / "link").symlink_to("a")
    model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["a", "link"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds files that are no checkpoint"):
        model.save_pretrained(tmp_path / "b")
    (tmp_path / "a/adapter.safetensors").write_text("somebody's")
    model.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a/adapter.safetensors").read_text() == "somebody's"
    (tmp_path / "a/adapter.safetensors").unlink()
    (tmp_path / "a/manifest.json").write_text("{}")  # as of a snapshot of a run, beside which an optimizer's state lies
    with pytest.raises(ValueError, match="holds files that are no checkpoint"):
        model.save_pretrained(tmp_path / "a")
    (tmp_path / "a/manifest.json").unlink()
    (tmp_path / "a/run.json").write_text("{}")
    with pytest.raises(ValueError, match="holds files that are no checkpoint"):
        model.save_pretrained(tmp_path / "a")


def test_source_that_is_gone(tmp_path, model):
    model.save_pretrained(tmp_path / "a")
    assert nk.HybridModel.from_pretrained(tmp_path / "a").source is None
    (tmp_path / "a/tokenizer.json").write_text("{}")
    again = nk.HybridModel.from_pretrained(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(ValueError, match="is gone, and with it the tokenizer; do: set model.source"):
        again.save_pretrained(tmp_path / "c")
    again.source = None
    again.save_pretrained(tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir() if p.name != "c"] == ["b"]


def test_single_file_under_another_name(tmp_path, parts):
    write(tmp_path, *parts)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    nk.HybridModel.from_pretrained(tmp_path)
    save_file(load_file(tmp_path / "weights.safetensors"), tmp_path / "more.safetensors")
    assert "holds 2 shards and no" in refusal(tmp_path)
