"""Who runs what: forcing, refusing, the environment variable."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops import _device, _dispatch, _tuned

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_the_first_that_does_not_refuse_serves(monkeypatch):
    x = torch.randn(4, 32)
    reasons = _dispatch.refusals("quantize", x, nk.QuantSpec(), None, None)
    serving, ran = [name for name, reason in reasons.items() if reason is None], []
    assert len(serving) >= 2
    for name in _dispatch.TABLE["quantize"]:
        module = _dispatch.implementation("quantize", name)
        monkeypatch.setattr(module, "run", lambda *a, run=module.run, name=name: ran.append(name) or run(*a))
    nk.quantize(x)
    first = _dispatch.implementation("quantize", serving[0])
    monkeypatch.setattr(first, "refuses", lambda *a: "out of order today")
    nk.quantize(x)
    assert ran == serving[:2]
    with nk.backend(serving[0]), pytest.raises(nk.Refused, match=f"{serving[0]}: out of order today"):
        nk.quantize(x)


def test_backend_nests_and_restores():
    before = _dispatch.candidates("matmul")
    with nk.backend("reference"):
        assert _dispatch.candidates("matmul") == ("reference",)
        with nk.backend("native", "reference"):
            assert _dispatch.candidates("matmul") == ("native", "reference")
        assert _dispatch.candidates("matmul") == ("reference",)
    assert _dispatch.candidates("matmul") == before
    with pytest.raises(ValueError, match="backend: got cuda2; allowed: "), nk.backend("cuda2"):
        pass


def test_a_backend_that_an_op_lacks_is_named():
    with nk.backend("triton"), pytest.raises(nk.Refused, match="mixer_step has no triton implementation"):
        _dispatch.select("mixer_step")


def test_environment_variable():
    code = "from nvfp4_kernels.ops._dispatch import candidates; print(*candidates('quantize'))"
    for value, expected in (("reference", "reference"), ("native,reference", "native reference")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"NVFP4_BACKEND": value, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
        )
        assert done.stdout.decode().strip() == expected, done.stderr


def test_what_comes_first_on_a_gpu_is_what_the_bounds_say():
    rows, resources = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("bounds", "resources"))
    registers = {(row["kernel"], row["arch"]): row["registers"] for row in resources if row["case"] == "CUDA"}
    answers: dict[tuple, set] = {}
    for row in rows:
        native, triton = row["native"]["us"], row["triton"]["us"]
        assert row["close"] == (max(native, triton) <= 1.15 * min(native, triton)), row["kind"]
        assert row["first"] == ("triton" if triton < native and not row["close"] else "native"), row["kind"]
        answers.setdefault((*row["kind"].split(": "), row["target"]), set()).add(row["first"])
        for launch in row["native"]["launches"]:  # of the kernels that there are now
            assert launch["registers"] == registers[launch["kernel"], int(row["target"].rstrip("af"))], launch["kernel"]
    assert {target for *_, target in answers} == {"80", "90a", "100a", "103a", "120f"}
    expected: dict[str, dict[str, tuple]] = {}
    for (op, kind, target), first in answers.items():
        if first == {"triton"}:
            kinds = expected.setdefault(op, {})
            kinds[kind] = (*kinds.get(kind, ()), target)
    assert expected == _dispatch.TRITON_FIRST


@pytest.mark.parametrize("capability, first", [((9, 0), "triton"), ((12, 1), "native"), (None, "native")])
def test_bounds_come_after_measurements_and_names(capability, first, monkeypatch):
    x = torch.empty(4, 1, 2, 64, dtype=torch.float16, device="meta")
    call = x, x, *[None] * 9, x, True, 0.0, torch.inf  # state_update, with noise
    with _device.assumed(capability):
        assert _dispatch.candidates("state_update", call)[0] == first
        assert _dispatch.candidates("state_update") == _dispatch.TABLE["state_update"]
        for answer in ("native", "triton"):
            with _tuned.trying({"state_update: float16, few sequences, noise": answer}):
                assert _dispatch.candidates("state_update", call)[0] == answer
        with nk.backend("native", "reference"):
            assert _dispatch.candidates("state_update", call) == ("native", "reference")
