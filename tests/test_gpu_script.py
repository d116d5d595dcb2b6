"""benchmarks/gpu/run.py without a GPU: it says so, and its cases run at tiny sizes, the kernels interpreted."""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import cases, measure
from benchmarks.gpu import run as script
from benchmarks.gpu.run import step
from nvfp4_kernels.ops import _dispatch, _triton

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu" / "run.py"


def run(*arguments):
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_it_says_that_there_is_no_gpu():
    assert "no GPU here" in run().stdout


def test_a_step_that_overruns_leaves_nothing_behind(tmp_path):
    done = tmp_path / "done"
    assert step(["bash", "-c", f"(sleep 0.7; touch {done}) & wait"], 0.2) == "stopped after 0.2 s"
    time.sleep(0.8)
    assert not done.exists()
    assert step(["bash", "-c", f"touch {done}; exit 3"], 60).startswith("exit status 3, ") and done.exists()


def test_tests_in_several_processes(tmp_path, capfd):
    sources = {
        "test_a.py": "def test_it(): pass\ndef test_other(): assert 1 == 2",
        "test_b.py": "import time\ndef test_first(): assert 1 == 2\ndef test_hangs(): time.sleep(90)",
        "test_c.py": "import a_module_that_is_not_there",
    }
    files = [tmp_path / name for name in sources]
    for file in files:
        file.write_text(sources[file.name])
    told = script.suite(files[::2], 60)
    assert told.startswith("not ok, ") and "1 passed" in told and "1 failed" in told and "1 error" in told
    out = capfd.readouterr().out
    assert "FAILED " in out and "::test_other" in out and "ERROR " in out
    told = script.suite(files[1:2], 15)
    assert told.startswith("not ok, 1 failed, 1 of 1 processes stopped")
    out = capfd.readouterr().out
    assert "::test_first FAILED" in out and "stopped at " in out and "::test_hangs" in out


MEASURED = """
import json, os, sys, time
log, resume = open(sys.argv[2], "a", buffering=1), sys.argv[-2:]
def tell(**line): log.write(json.dumps(line) + chr(10))
def entry(op): tell(entry={"extra_info": {"op": op, "case": "c", "backend": "b"}, "stats": {"median": 1.0}})
if resume == ["0", "0"]:
    entry("first")
    tell(resume=[0, 1], what="the one that crashes")
    os.abort()
if resume == ["0", "1"]:
    tell(resume=[1, 0], what="the one that hangs")
    time.sleep(60)
entry("last")
"""


def test_benchmarks_go_on_behind_one_that_crashes_or_hangs(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(script, "MEASURE", tmp_path / "measure.py")
    monkeypatch.setattr(script, "HANGS", 1)
    script.MEASURE.write_text(MEASURED)
    assert [row["op"] for row in script.measure(["cuda"], None, time.monotonic() + 60)] == ["first", "last"]
    err = capfd.readouterr().err
    assert "the one that crashes: exit status -6" in err and "the one that hangs: hung for 1 s" in err
    script.MEASURE.write_text("raise SystemExit('no')")  # it cannot begin: no endless starting
    assert script.measure(["cuda"], None, time.monotonic() + 5) == []
    assert capfd.readouterr().err.count("exit status 1") == 1
    script.MEASURE.write_text(MEASURED)
    monkeypatch.setattr(script, "HANGS", 60)
    assert [row["op"] for row in script.measure(["cuda"], None, time.monotonic() + 3)] == ["first"]
    assert "no time left for the one that hangs" in capfd.readouterr().err


def test_order_of_the_benchmarks(monkeypatch, capfd):
    """A group whose inputs cannot be made is left; what came before the place to resume at is not run again."""

    def group(name):
        def cases_of(device, small, sweep):
            yield cases.Case("op", f"{name}{sweep:d}", None, {"peer": None}, {}, False)
            if name == "a":
                raise MemoryError("too large")
            yield cases.Case("other", f"{name}{sweep:d}", None, {}, {}, False)

        cases_of.__name__ = name
        return cases_of

    monkeypatch.setattr(cases, "GROUPS", [group("a"), group("b")])
    told = []
    given = SimpleNamespace(device="cpu", small=True, only=None, resume=(0, 0))

    def run():
        made = measure.runs(given, lambda **line: told.append(line))
        return [(place, case.name, name) for place, _, case, name, *_ in made]

    everything = run()
    assert [(case, name) for _, case, name in everything] == [
        (f"{group}{sweep}", name)
        for sweep in (0, 1)
        for group in "ab"
        for name in ("nvfp4_kernels", "peer", "nvfp4_kernels")[: 2 if group == "a" else 3]
    ]
    assert {
        "resume": (1, 0),
        "what": "a: inputs",
    } in told and "a: inputs: MemoryError: too large" in capfd.readouterr().err
    for done, (place, *_) in enumerate(everything):
        given.resume = place
        assert run() == everything[done + 1 :]
    given.resume, given.only = (0, 0), "other"
    assert [case for _, case, _ in run()] == ["b0", "b1"]


@pytest.mark.skipif(_triton.triton is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_rehearsal(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import tests.conftest")  # with its faster interpreter
    path = [str(tmp_path), str(SCRIPT.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    done = run("--rehearse")
    assert not done.stderr.strip(), done.stderr[-2000:]
    measured = {
        tuple(line.split(", ")[0:1]) + (line.rsplit(", ", 1)[1].split(":")[0],)
        for line in done.stdout.splitlines()
        if line.endswith(" us")
    }
    for op, names in _dispatch.TABLE.items():
        if op not in (
            "grouped_matmul",
            "grouped_relu2",
            "expert_mlp",
            "route",
            "router_logits",
            "permute",
            "relu2",
            "mixer_step",
            "moe_step",
        ):  # within others
            assert {name for name in names if name != "reference"} <= {
                backend for of, backend in measured if of == op
            }, op
    assert {("moe", "nvfp4_kernels"), ("moe decode", "nvfp4_kernels")} <= measured
