"""nvfp4 quantize and nvfp4 eval as a user runs them, on a small random model: a run of nvfp4 train, and its checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nvfp4_kernels.checkpoint import snapshot
from nvfp4_kernels.checkpoint.huggingface import from_pretrained, save_pretrained
from nvfp4_kernels.cli import main as cli
from nvfp4_kernels.generate.chat import FolderTokenizer
from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.model.hybrid import HybridModel
from nvfp4_kernels.train.byte_level import tokenizer_json
from nvfp4_kernels.train.settings import Settings
from nvfp4_kernels.train.tokenizer import ByteTokenizer, JsonTokenizer

pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")

CONFIG = HybridConfig(
    hybrid_override_pattern="MEM*E", vocab_size=260, pad_token_id=256, bos_token_id=257, eos_token_id=258, hidden_size=48,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16, mamba_num_heads=2, mamba_head_dim=16, ssm_state_size=16,
    n_groups=1, chunk_size=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=48, initializer_range=0.2,
)  # fmt: skip
TEXT = "The quick brown fox jumps over the lazy dog, déjà vu. " * 9


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """run/ of nvfp4 train, hf/ the same weights as a checkpoint, and texts; the working directory."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    model = HybridModel(CONFIG)
    texts = {"config.json": json.dumps(CONFIG.to_dict())}
    snapshot.save(tmp_path / "run" / "checkpoints", 7, {"model": model.state_dict()}, {}, texts)
    (tmp_path / "run" / "run.json").write_text(Settings(out=str(tmp_path / "run")).to_json())
    save_pretrained(model, tmp_path / "hf", dtype=torch.bfloat16)
    (tmp_path / "hf" / "tokenizer.json").write_text(tokenizer_json(ByteTokenizer(258)))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    return tmp_path


def run(capsys, *argv):
    status = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def test_a_run_by_recipe_then_eval(folder, capsys):
    common = ("--text", "text.txt", "--length", 64)
    out = run(
        capsys, "quantize", "--model", "run", "--out", "q", "--recipe", "nano-nvfp4", "--calibrate", "text.txt", *common
    )
    assert (
        "nano-nvfp4, search max: " in out
        and "\ninputs quantized too: perplexity" in out
        and "in q: the checkpoint" in out
        and "the whole model was held in memory" in out
    )
    report = json.loads((folder / "q" / "quantization_report.json").read_text())
    names = {p.name for p in (folder / "q").iterdir()}
    assert {"config.json", "hf_quant_config.json", "model.safetensors", "tokenizer.json", "errors.png"} < names
    size = (folder / "q" / "model.safetensors").stat().st_size
    assert report["bytes_after"] < size < report["bytes_after"] + 30_000  # the header
    assert not list(folder.glob(".writing*"))
    out = run(capsys, "eval", "--model", "q", *common, "--json", "eval.json")
    got = json.loads((folder / "eval.json").read_text())
    assert got["nats_a_token"] == report["after"]["nats_a_token"]  # what is stored is what was measured
    assert got["bytes"] == len(TEXT.encode()) - 1 == got["tokens"] and got["length"] == 64
    assert f"{got['bits_a_byte']:.4f} bits a byte" in out and "0 - 63" in out and "tokens/s" in out
    for options in ((), ("--kv-cache", "fp8"), ("--kv-cache", "checkpoint")):
        assert run(capsys, "generate", "--model", "q", "--prompt", "The ", "--tokens", 3, *options).startswith("The ")
    before = run(capsys, "eval", "--model", "run", *common)
    assert f"{report['before']['nats_a_byte']:.4f} nats a byte" not in before  # a run is evaluated by its own recipe


def test_a_checkpoint_by_patterns(folder, capsys):
    patterns = ("--pattern", "*.experts.*=w4a16", "--pattern", "*.out_proj=w4a16")
    out = run(capsys, "quantize", "--model", "hf", "--out", "deep/q", *patterns, "--search", "mse")
    assert "perplexity" not in out and "patterns, search mse" in out and "one layer at a time was held" in out
    account = json.loads((folder / "deep/q/hf_quant_config.json").read_text())["quantization"]
    assert account["quant_algo"] == "W4A16_NVFP4" and account["kv_cache_quant_algo"] is None
    source, model = from_pretrained(folder / "hf"), from_pretrained(folder / "deep/q")
    mine = model.get_submodule("backbone.layers.1.mixer.experts").down_proj
    plain = source.get_submodule("backbone.layers.1.mixer.experts").down_proj.detach()
    assert 0 < float((mine.dequantize() - plain.float()).norm() / plain.float().norm()) < 0.12
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
    assert (folder / "deep/q/tokenizer.json").read_text() == (folder / "hf/tokenizer.json").read_text()
    run(capsys, "eval", "--model", "deep/q", "--text", "text.txt")


def test_a_plan_that_quantizes_nothing_writes_the_plain_checkpoint(folder, capsys):
    run(capsys, "quantize", "--model", "hf", "--out", "q", "--pattern", "*=bf16")
    assert not (folder / "q/hf_quant_config.json").exists()
    source, model = from_pretrained(folder / "hf"), from_pretrained(folder / "q")
    for name, tensor in source.state_dict().items():
        if not name.endswith("noise"):
            assert torch.equal(tensor.bfloat16(), model.state_dict()[name].bfloat16()), name


def test_under_a_budget(folder, capsys):
    out = run(
        capsys, "quantize", "--model", "hf", "--out", "q", "--bits", 6, "--calibrate", "text.txt", "--length", 128
    )
    report = json.loads((folder / "q" / "quantization_report.json").read_text())
    assert 5.5 < report["bits_a_weight"] <= 6 and len(report["sensitivity"]) == 3 * 12
    assert f"6.0 bits, search max: {report['bits_a_weight']:.2f} bits a weight" in out


def test_eval_of_texts_around_the_context(folder, capsys):
    for count, length in ((2, 2048), (40, 39), (40, 40), (200, 64)):
        (folder / "t.txt").write_text("a b\n" * count)
        out = run(capsys, "eval", "--model", "hf", "--text", "t.txt", "--length", length)
        assert f"windows of {min(length, 4 * count - 1)}" in out


ARGUMENTS = {
    "quantize": {"--model": "hf", "--out": "q", "--recipe": "nano-nvfp4", "--calibrate": "text.txt"},
    "eval": {"--model": "hf", "--text": "text.txt"},
}


@pytest.mark.parametrize("command, changes, message", [
    ("quantize", {"--recipe": "nano-fp4"}, "recipe: got 'nano-fp4'; allowed: super-nvfp4"),
    ("quantize", {"--recipe": "nano-fp4"}, "; nearest: nano-nvfp4"),
    ("quantize", {"--calibrate": None}, "calibrate: got no text"),
    ("quantize", {"--calibrate": "no.txt"}, "calibrate: no.txt does not exist; do: give a text file"),
    ("quantize", {"--calibrate": "binary.txt"}, "calibrate: binary.txt is binary, not text; do: "),
    ("quantize", {"--text": "empty.txt"}, "text: got 0 tokens in empty.txt; allowed: at least 2"),
    ("quantize", {"--recipe": None}, "one of the arguments --recipe --pattern --bits is required"),
    ("quantize", {"--bits": "5"}, "not allowed with"),
    ("quantize", {"--recipe": None, "--bits": "4"}, "bits: got 4.0; allowed: at least 4.5"),
    ("quantize", {"--recipe": None, "--pattern": "*.in_proj"}, "pattern: got '*.in_proj'; allowed: GLOB=FORMAT"),
    ("quantize", {"--recipe": None, "--pattern": "*.in_proj=fp4"}, "got format 'fp4'"),
    ("quantize", {"--four-over-six": "mae", "--search": "mse"}, "four_over_six: got 'mae' with search mse"),
    ("quantize", {"--out": "hf"}, "out: hf is there already; do: name another folder"),
    ("quantize", {"--model": "nothing"}, "nothing does not exist"),
    ("quantize", {"--length": "0"}, "length: got 0; allowed: at least 1"),
    ("eval", {"--text": "no.txt"}, "text: no.txt does not exist; do: give a text file"),
    ("eval", {"--text": "empty.txt"}, "text: got 0 tokens in empty.txt; allowed: at least 2"),
    ("eval", {"--text": "one.txt"}, "text: got 1 token in one.txt"),
    ("eval", {"--text": "."}, "text: . cannot be read"),
    ("eval", {"--length": "0"}, "length: got 0; allowed: at least 1"),
    ("eval", {"--text": None}, "--text"),
])  # fmt: skip
def test_errors_are_one_line_and_leave_nothing(command, changes, message, folder, capsys):
    before = sorted(folder.rglob("*"))
    arguments = ARGUMENTS[command] | changes
    argv = [word for flag, value in arguments.items() if value is not None for word in (flag, value)]
    assert cli.main([command, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert sorted(folder.rglob("*")) == before


def test_a_checkpoint_without_tokenizer(folder, capsys):
    (folder / "hf" / "tokenizer.json").unlink()
    assert cli.main(["eval", "--model", "hf", "--text", "text.txt"]) == 2
    assert "tokenizer: got hf/tokenizer.json, which is no file" in capsys.readouterr().err


def test_a_failure_while_writing_leaves_nothing(folder, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nvfp4_kernels.ptq.plots.plot_errors", full)
    assert cli.main(["quantize", "--model", "hf", "--out", "q", "--pattern", "*.in_proj=w4a16"]) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert not (folder / "q").exists() and not list(folder.glob(".writing*"))


def test_bytes_as_a_tokenizer_json(tmp_path):
    path = Path(tmp_path / "tokenizer.json")
    path.write_text(tokenizer_json(ByteTokenizer(258)))
    tokenizer = JsonTokenizer(path)
    text = "".join(map(chr, range(1, 0x500))) + " <|endoftext|"
    assert np.array_equal(tokenizer.encode(text.encode()), np.frombuffer(text.encode(), np.uint8))
    assert tokenizer.decode(tokenizer.encode(text.encode())) == text.encode()
    assert tokenizer.separator == 258 and tokenizer.vocab_size == 257
    path.write_text(tokenizer_json(ByteTokenizer()))
    assert JsonTokenizer(path).separator is None


def test_truncation_and_padding_kept_in_a_tokenizer_json(tmp_path):
    path = Path(tmp_path / "tokenizer.json")
    kept = json.loads(tokenizer_json(ByteTokenizer(258)))
    kept["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    kept["padding"] = {
        "strategy": {"Fixed": 8}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }  # fmt: skip
    path.write_text(json.dumps(kept))
    assert bytes(JsonTokenizer(path).encode(b"a text").tolist()) == b"a text"
    assert bytes(FolderTokenizer(tmp_path).encode("as long as it is")) == b"as long as it is"
