"""Each command end to end at small sizes."""

import json
import re
import subprocess
import sys

import pytest
import torch

from nvfp4_kernels.cli import bench, demo, main, plan
from nvfp4_kernels.model.hybrid import HybridModel
from nvfp4_kernels.model.presets import preset
from nvfp4_kernels.ops import _dispatch
from nvfp4_kernels.recipe import get_recipe


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"document {i}: " + "the quick brown fox jumps over the lazy dog. " * 40)
    return folder


def run(capsys, *argv):
    status = main.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out, err


def test_train_resume_generate(capsys, tmp_path, text):
    pytest.importorskip("matplotlib")
    common = ["--data", text, "--out", tmp_path / "run"]
    small = ["--batch", 1, "--length", 64, "--steps", 2, "--threads", 1]
    out, _ = run(capsys, "train", *common, *small, "--prompt", "the ", "--sample", 5)
    assert "validation loss" in out and "nats a byte" in out and "\nthe " in out
    status = main.main(["train", *map(str, common)])
    assert status == 2 and "already holds a run" in capsys.readouterr().err
    out, err = run(capsys, "train", *common[2:], "--resume", "--steps", 3, "--sample", 0)
    assert "3 steps" in out and "resumed at step 2 of 3" in err
    one, two = (
        run(capsys, "generate", "--model", tmp_path / "run", "--prompt", "a", "--tokens", 5, "--quiet")[0]
        for _ in range(2)
    )
    assert one == two
    status = main.main(["generate", "--model", str(tmp_path / "run"), "--prompt", ""])
    assert status == 2 and "prompt" in capsys.readouterr().err


def test_demo(capsys, monkeypatch, tmp_path, text):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(demo, "TOKENS", 40)
    out, _ = run(capsys, "demo", "--steps", 2, "--data", text, "--out", tmp_path / "demo")
    assert "unigram" in out and "gap to bf16" in out and "200 bytes from the NVFP4 model:\ndef " in out
    drafts = out[out.index("speculative decoding of one sequence") :]
    assert len(re.findall(r"\d drafts [\d,]+ \([\d.]+x, acceptance length \d\.\d\d\)", drafts)) == 6
    assert (tmp_path / "demo/loss.png").exists() and (tmp_path / "demo/nvfp4/checkpoints").exists()


def test_ablate_prints_every_technique(capsys, tmp_path, text):
    pytest.importorskip("matplotlib")
    out, _ = run(
        capsys,
        "train",
        "--ablate",
        "--steps",
        1,
        "--batch",
        1,
        "--length",
        64,
        "--data",
        text,
        "--out",
        tmp_path / "a",
        "--threads",
        1,
    )
    for label in ("bf16", "nvfp4 without RHT", "nvfp4 without SR", "nvfp4 without 2D", "nvfp4 with 4/6"):
        assert f"\n{label}" in "\n" + out


def test_info_prints_the_dispatch_table(capsys, monkeypatch):
    native = _dispatch.implementation("quantize", "reference")
    monkeypatch.setattr(native, "refuses", lambda *a: "because of a test")
    report = json.loads(run(capsys, "info", "--json")[0])
    assert set(report["ops"]["cpu"]) == set(_dispatch.TABLE)
    for op, names in _dispatch.TABLE.items():
        assert set(report["ops"]["cpu"][op]) == set(names)
        assert list(report["ops"]["cpu"][op].values()).count("first") <= 1
    assert report["ops"]["cpu"]["quantize"]["reference"] == "because of a test"
    assert report["versions"]["torch"] == torch.__version__ and report["devices"][0]["device"] == "cpu"
    text = run(capsys, "info")[0]
    number = re.search(r"\[(\d)\] because of a test", text)[1]
    assert re.search(rf"^quantize .* no \[{number}\]", text, re.M) and "selective_scan" in text


def test_info_says_what_is_forced(capsys):
    with _dispatch.backend("reference"):
        report = json.loads(run(capsys, "info", "--json")[0])
    assert report["ops"]["cpu"]["matmul"] == {"reference": "first"}


@pytest.mark.parametrize("recipe", ["nvfp4", "nemotron3", "bf16"])
def test_plan_agrees_with_the_model(capsys, recipe):
    report = json.loads(run(capsys, "plan", "--preset", "tiny", "--recipe", recipe, "--json", "--tokens", 64)[0])
    model = HybridModel(preset("tiny"), recipe)
    layers = {row["layer"]: row for row in report["layers"]}
    linears = {n: m.recipe for n, m in model.named_modules() if type(m).__name__ == "Linear"}
    assert set(linears) < set(layers)
    for name, linear_recipe in linears.items():
        for operand, text in layers[name]["operands"].items():
            spec = getattr(linear_recipe, operand)
            assert text.split(":")[0] == (spec.format if spec else "bf16"), (name, operand)
            assert spec is None or ("sr" in text) == spec.stochastic and ("rht" in text) == (spec.hadamard is not None)
    assert sum("experts.up_proj" in name and "shared" not in name for name in layers) == 3
    ours = [row for name, row in layers.items() if "mixer.experts" in name or name.endswith("gate")]
    assert len(ours) == 3 * 3 and not any(row["backend"].startswith("torch") for row in ours)
    count = sum(p.numel() for p in model.parameters())
    assert report["weights"]["total"]["parameters"] == count and report["weights"]["fp32 masters"]["bytes"] == 4 * count
    assert ("nvfp4" in report["weights"]) == (recipe != "bf16")


def test_plan_of_the_largest_preset_allocates_nothing(capsys):
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = run(capsys, "plan", "--preset", "ultra-550b", "--recipe", "nemotron3")[0]
    assert "last 15% of the layers" in text and "Mamba output" in text and "mxfp8" in text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB, of 2 TB of masters
    assert len(text.splitlines()) < 60


def test_plan_names_the_reason_of_a_fallback(monkeypatch):
    reference = _dispatch.implementation("quantize", _dispatch.candidates("quantize")[0])
    monkeypatch.setattr(reference, "refuses", lambda *a: "no such luck")
    got = plan._backend(get_recipe("nvfp4").default, 32, 32, 32)
    assert "no such luck" in got and "quantize" in got


@pytest.mark.parametrize(("op", "call", "wanted"), [
    ("quantize", lambda x, row, col, noise: x.shape[1] == 48, "quantize x and w"),
    ("matmul", lambda a, b, *rest: a.shape == (64, 48) and b.shape[0] == 32, "matmul fprop and wgrad"),
    ("matmul", lambda a, b, *rest: a.shape == (48, 64), "matmul fprop and dgrad"),
])  # fmt: skip
def test_plan_asks_for_every_gemm(monkeypatch, op, call, wanted):
    """Of 64 rows through a matrix [48, 32]: one call of dy, dgrad or wgrad is refused, and that alone."""
    first = _dispatch.implementation(op, _dispatch.candidates(op)[0])
    monkeypatch.setattr(first, "refuses", lambda *a: "not this one" if call(*a) else None)
    got = plan._backend(get_recipe("nvfp4").default, 64, 48, 32)
    other = {"quantize": "dy", "matmul fprop and wgrad": "dgrad", "matmul fprop and dgrad": "wgrad"}
    refused = other.get(wanted) or other[op]
    assert wanted in got and f"{op} {refused} " in got and got.count("not this one") == 1


def test_plan_names_a_wrong_number_of_tokens(capsys):
    assert main.main(["plan", "--tokens", "0"]) == 2
    assert "tokens: got 0; allowed: at least 1" in capsys.readouterr().err


BENCH = """
import pytest, time

@pytest.mark.parametrize("backend", ["fast", "slow"])
def test_toy(benchmark, backend):
    benchmark.extra_info.update(op="toy", case="16x16", backend=backend, dtype="bf16", bytes=10**6, flops=0,
                                yardstick=backend == "slow")
    benchmark.pedantic(time.sleep, args=(0.001 if backend == "fast" else 0.004,), rounds=3)
"""


def test_bench_end_to_end(capsys, tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "bench_toy.py").write_text(BENCH)
    out, err = run(capsys, "bench", "--folder", tmp_path)
    assert "toy" in out and "fast" in out and "x slow" in out
    (stored,) = (tmp_path / "results").iterdir()
    rows = json.loads(stored.read_text())["rows"]
    assert {row["backend"] for row in rows} == {"fast", "slow"}
    assert all(row["bytes_per_second"] == pytest.approx(1e6 / row["seconds"]) for row in rows)
    run(capsys, "bench", "--folder", tmp_path, "--filter", "fast")
    assert len(json.loads(stored.read_text())["rows"]) == 2  # the slow one stays
    assert main.main(["bench", "--folder", str(tmp_path), "--filter", "none"]) == 2
    assert capsys.readouterr().err.startswith("error: filter: got 'none'; allowed: part of a case's name")
    (tmp_path / "bench_toy.py").write_text("def test_broken():\n    assert 1 == 2\n")
    assert main.main(["bench", "--folder", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: bench: pytest failed (assert 1 == 2)") and err.count("\n") == 1


def entry(backend, median, **extra):
    return {
        "name": "t",
        "extra_info": {"op": "o", "case": "c", "backend": backend, **extra},
        "stats": {"median": median},
    }


def test_bench_rows():
    rows = bench.rows_of({"benchmarks": [
        entry("native", 0.5, bytes=100, flops=1000, limit_bytes=400), entry("torch", 2.0, yardstick=True),
        entry("other", 4.0, yardstick=True), {**entry("native", 1.0), "extra_info": {"op": "o", "case": "d"}},
    ]})  # fmt: skip
    assert (
        rows[0]["bytes_per_second"] == 200 and rows[0]["flops_per_second"] == 2000 and rows[0]["share_of_limit"] == 0.5
    )
    assert rows[0]["times_yardstick"] == 4.0 and rows[0]["against"] == "torch"  # the faster of the yardsticks
    assert "times_yardstick" not in rows[1] and "times_yardstick" not in rows[3]


def test_module_runs_as_the_command():
    got = subprocess.run(
        [sys.executable, "-m", "nvfp4_kernels", "--version"], capture_output=True, text=True, check=True
    )
    assert got.stdout.startswith("nvfp4_kernels 0.")
