"""The cases that nvfp4 check runs, and that it finds what is wrong: a wrong value, a refusal, a crash, a process that hangs."""

import json
import math
import sys
import time

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.cli import check as command
from nvfp4_kernels.cli.main import main
from nvfp4_kernels.ops import _device, _dispatch, _triton
from nvfp4_kernels.testing import rounding_probe, run
from nvfp4_kernels.testing.cases import cases
from nvfp4_kernels.testing.compare import difference


@pytest.mark.parametrize("op", _dispatch.TABLE)
def test_each_op_has_cases_that_the_native_backend_passes(op):
    native = [name for name in _dispatch.TABLE[op] if name in ("native", "reference")]
    found = cases(op)
    assert len(found) >= 2 and len({case.name for case in found}) == len(found)
    for case in found:
        for backend in native:
            assert run.check(case, backend, "cpu") == {"case": case.name, "backend": backend, "result": "pass"}


def test_inputs_are_the_same_each_time():
    for op in _dispatch.TABLE:
        case = cases(op)[0]
        first, second = case.make(), case.make()
        for name, value in first.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value.nan_to_num(), second[name].nan_to_num())


def test_a_wrong_kernel_is_found(monkeypatch):
    module = _dispatch.implementation("hadamard", "native")
    right = module.run

    def wrong(x, signs):
        y = right(x, signs)
        y[-1, 3] += 0.5
        return y

    monkeypatch.setattr(module, "run", wrong)
    row = run.check(cases("hadamard")[0], "native", "cpu")
    assert (
        row["result"] == "FAIL" and row["detail"].startswith("y: [16, 3]: got ") and "1 of 816 differ" in row["detail"]
    )


def test_what_a_backend_says_against_a_call_is_told(monkeypatch):
    module = _dispatch.implementation("hadamard", "native")
    monkeypatch.setattr(module, "refuses", lambda *_: "it is Sunday")
    row = run.check(cases("hadamard")[0], "native", "cpu")
    assert row["result"] == "refused" and row["detail"] == "it is Sunday"

    def broken(*_):
        raise IndexError("no such lane")

    monkeypatch.setattr(module, "refuses", lambda *_: None)
    monkeypatch.setattr(module, "run", broken)
    row = run.check(cases("hadamard")[0], "native", "cpu")
    assert row["result"] == "error" and "IndexError: no such lane (broken, line" in row["detail"]


def test_difference():
    x = torch.tensor([1.0, math.nan, math.inf, -0.0])
    assert difference("x", x, x.clone(), None) is None and difference("x", x, x.clone(), 1e-6) is None
    assert "[3]: got 0.0, want -0.0" in difference("x", x.abs(), x, None)
    assert difference("x", x.abs(), x, 1e-6) is None  # the sign of a zero is within any tolerance
    assert "[1]: got 2.0, want nan" in difference("x", torch.tensor([1.0, 2.0, math.inf, 0]), x, 1e-6)
    assert "[2]: got -inf" in difference("x", torch.tensor([1.0, math.nan, -math.inf, 0]), x, 1e-6)
    assert "relative error 1.0e-03 above 1e-04" in difference("x", torch.tensor([1.001]), torch.tensor([1.0]), 1e-4)
    assert "got torch.float32 [1], want torch.float64 [1]" in difference("x", x[:1], x[:1].double(), 1e-4)
    q = nk.quantize(torch.randn(2, 32))
    other = nk.NVFP4Tensor(q.codes ^ torch.tensor([[0] * 15 + [1]]).byte(), q.scales, q.global_scale, q.shape)
    assert difference("q", q, q.clone(), None) is None
    assert difference("q", other, q, 0.5).startswith("q.codes: [0, 15]: got ")
    nan = torch.tensor([0x7FC00001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert difference("nan", nan, nan.flip(0), None) is None


def test_the_command(tmp_path, capsys):
    out = tmp_path / "report.json"
    assert main(["check", "--device", "cpu", "--op", "relu2", "--out", str(out)]) == 0
    assert "pass 2" in capsys.readouterr().out
    report = json.loads(out.read_text())
    results = {(row["backend"], row["result"]) for row in report["ops"]["relu2"]}
    refused = {"triton"} if _triton.missing else set()
    assert results == {(name, "refused" if name in refused else "pass") for name in _dispatch.TABLE["relu2"]}
    assert report["machine"]["versions"]["torch"] and "software rule" in report["stochastic_rounding"]
    assert main(["check", "--op", "relu"]) == 2 and "nearest: relu2" in capsys.readouterr().err
    assert main(["check", "--device", "abacus"]) == 2 and "device: got 'abacus'" in capsys.readouterr().err


LINE = json.dumps({"case": "first", "backend": "BACKEND", "result": "started"})
PASSED = LINE.replace("started", "pass")


def in_the_place_of_python(monkeypatch, tmp_path, ending):
    script = tmp_path / "python"
    script.write_text(
        f"""#!/bin/bash
shift 4
for backend in "$@"; do
  echo '{LINE}' | sed s/BACKEND/$backend/
  if [ $backend = bad ]; then {ending}; fi
  echo '{PASSED}' | sed s/BACKEND/$backend/
done
"""
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("kill -SEGV $$", "signal 11"),
        ("echo ouch >&2; exit 3", "exit status 3: ouch"),
        ("exec sleep 60", "nothing within"),
    ],
)
def test_a_backend_that_takes_its_process_down_costs_its_own_cell(monkeypatch, tmp_path, ending, said):
    """An interpreter that plays a process in which the backend "bad" dies at its first case."""
    in_the_place_of_python(monkeypatch, tmp_path, ending)
    monkeypatch.setattr(command, "SECONDS", 2)
    rows = command.check("hadamard", ("good", "bad", "fine"), "cpu", time.monotonic() + 60)
    assert [(row["backend"], row["result"]) for row in rows] == [("good", "pass"), ("bad", "crash"), ("fine", "pass")]
    assert said in rows[1]["detail"] and rows[1]["case"] == "first"
    report = {"device": "cpu", "ops": {"hadamard": rows}, "stochastic_rounding": "not asked"}
    text = command.render(report)
    assert "crash (0 of 1 pass)" in text and f"hadamard, bad, first: crash: {said}" in text


def test_the_whole_has_an_end(monkeypatch, tmp_path):
    in_the_place_of_python(monkeypatch, tmp_path, "exec sleep 60")
    rows = command.check("hadamard", ("good", "bad", "fine"), "cpu", time.monotonic() + 2)
    assert [row["result"] for row in rows] == ["pass", "crash", "not run"]
    assert all("not through after 110 s in all" in row["detail"] for row in rows[1:])
    assert [row["case"] for row in rows[1:]] == ["first", "before the first"]
    monkeypatch.setattr(command, "SECONDS", 0.5)
    script = tmp_path / "python"
    script.write_text("#!/bin/bash\nexec sleep 60\n")
    assert command._probe("cpu") == "could not be asked: nothing within 0.5 s"


def test_a_process_that_hangs_after_its_case(monkeypatch, tmp_path):
    in_the_place_of_python(monkeypatch, tmp_path, f"echo '{PASSED}' | sed s/BACKEND/bad/; exec sleep 60")
    monkeypatch.setattr(command, "SECONDS", 2)
    rows = command.check("hadamard", ("bad", "fine"), "cpu", time.monotonic() + 60)
    assert [(row["case"], row["result"]) for row in rows] == [
        ("first", "pass"),
        ("after first", "crash"),
        ("first", "pass"),
    ]


def test_a_lost_device_is_nobody_elses_fault(monkeypatch, capsys):
    """An error after which the device answers goes with its case; one after which it does not ends the process."""
    row = {"result": "error", "detail": "a wrong address"}
    monkeypatch.setattr(run, "check", lambda case, backend, device: row)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    run.main("relu2", "cuda", "native", "triton")
    assert capsys.readouterr().out.count("a wrong address") == 2 * len(cases("relu2"))

    def lost(device):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(SystemExit, match="answers no more after a wrong address"):
        run.main("relu2", "cuda", "native", "triton")
    assert capsys.readouterr().out.count("\n") == 1  # that the first case has started
    run.main("relu2", "cpu", "native")


def test_the_probe_finds_the_order_of_the_bits():
    """A chip that reads the bytes as the public probe of one says: the second value's and the fourth's bits reversed."""
    x, bits = rounding_probe.questions()
    places = [range(16, 24), range(7, -1, -1), range(24, 32), range(15, 7, -1)]  # bit of the word for weight 0, 1, ...
    codes = torch.zeros(bits.numel(), dtype=torch.int64)
    for value, place in enumerate(places):
        r = sum(((bits.long() >> bit) & 1) << weight for weight, bit in enumerate(place))
        up = r + (256 * (x[value] - 0.5) / 0.5).long() >= 256
        code = torch.where(x[value] > 0, torch.where(up, 2, 1), 0)
        codes |= code << 4 * (3 - value)
    found = rounding_probe.answers(codes.to(torch.int16))
    for value, place in enumerate(places):
        assert found[value] == {
            "nibble": 3 - value,
            "weights": {bit: w for w, bit in sorted(enumerate(place), key=lambda p: p[1])},
        }
    dead = rounding_probe.answers(torch.zeros(bits.numel(), dtype=torch.int16))
    assert dead == [{"nibble": None, "weights": {}}] * 4


def test_the_probe_asks_only_chips_that_can_answer(monkeypatch):
    for missing in (None, "Triton is not installed"):
        monkeypatch.setattr(rounding_probe, "missing", missing)
        assert "software rule" in rounding_probe.probe("cpu")
    with _device.assumed((10, 3)):
        assert _device.rounds_stochastically(torch.device("meta"))
    with _device.assumed((12, 0)):
        assert not _device.rounds_stochastically(torch.device("meta"))
