"""Who runs what: forcing, refusing, the environment variable."""

import subprocess
import sys

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops import _dispatch


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
