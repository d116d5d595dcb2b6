"""The README's Python runs as it stands there, in one folder, in order."""

import re
from pathlib import Path

import nvfp4_kernels as nk
from nvfp4_kernels.train.byte_level import tokenizer_json
from nvfp4_kernels.train.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[1]


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    """Those of models, on an untrained one in place of runs/tiny-nvfp4 and of q, and with fewer tokens."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names = ("nk.convert(", "save_pretrained(", "nk.Engine(", "patch_transformers()")
    assert [name in block for name, block in zip(names, blocks, strict=True)] == [True] * len(names)
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/tiny-nvfp4", "q"):
        nk.HybridModel(nk.preset("tiny")).save_pretrained(folder)
        Path(folder, "tokenizer.json").write_text(tokenizer_json(ByteTokenizer(258)))
    for block in blocks[:3]:  # the fourth changes transformers for good: tests/compat
        exec(block.replace("=200", "=4").replace("stop=[", "max_new_tokens=4, stop=["), {})
    assert Path("out/model.safetensors").is_file() and "length" in capsys.readouterr().out


def test_star_import():
    names: dict = {}
    exec("from nvfp4_kernels import *", names)
    assert names["quantize"] is nk.quantize and set(nk.__all__) <= set(names)
