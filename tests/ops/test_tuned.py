"""What nvfp4 tune finds: the fastest by the clock, never other bits, kept whole, used where nothing is forced."""

import json
import threading

import numpy as np
import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.cli import bench, info, plan
from nvfp4_kernels.cli import tune as command
from nvfp4_kernels.cli.main import main
from nvfp4_kernels.formats.groups import Stack
from nvfp4_kernels.ops import _cuda, _device, _dispatch, _triton, _tuned
from nvfp4_kernels.ops.grouped_matmul.op import grouped_matmul
from nvfp4_kernels.ops.grouped_matmul.triton import HALF, STAYING
from nvfp4_kernels.ops.matmul import _triton_block_scaled, _triton_decoded, _triton_tiles
from nvfp4_kernels.ops.matmul._packed import packed
from nvfp4_kernels.ops.matmul._triton_tiles import CHANGES, side
from nvfp4_kernels.tune.cases import Case, cases
from nvfp4_kernels.tune.measure import backends, tiles

CHIP = _device.Chip("meta", "Some GPU/1", "sm_90", "")  # tensors of the meta device stand for its own
QUANTIZE = torch.empty(4, 32, device="meta"), nk.QuantSpec(), None, None
interpreted = pytest.mark.skipif(
    _triton.triton is None or not _triton.INTERPRETED, reason="no Triton interpreter, in which the kernels run"
)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine with a GPU that nobody has tuned."""
    monkeypatch.setenv("NVFP4_CACHE", str(tmp_path))
    monkeypatch.setattr(_device, "chips", lambda: [CHIP])
    monkeypatch.setattr(_tuned, "shipped", lambda arch: tmp_path / f"{arch}.json")
    _tuned._tables.clear()
    yield
    _tuned._tables.clear()


@pytest.fixture
def steady_dot(monkeypatch):
    """The interpreter's dot adds along K one by one, as instructions do whatever the tile; numpy's order goes by the shape."""
    from triton.runtime import interpreter

    def dot(self, a, b, d, precision, most):
        products = a.data.T[:, :, None] * b.data[:, None, :]
        return interpreter.TensorHandle(d.data + np.add.reduce(products, 0), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def entry(answer, **us):
    return {"answer": answer, "us": us}


def products():
    """Calls whose K is a few steps, or splits, long, and no multiple of a tile."""
    a, b = nk.quantize(torch.randn(9, 1100)), nk.quantize(torch.randn(130, 1100))
    out, offsets = torch.empty(9, 130), torch.tensor([0, 3, 3, 9])
    x, dy, w = torch.randn(9, 450), torch.randn(9, 130), torch.randn(3, 130, 450)
    many, halves = torch.randn(150, 130).bfloat16(), torch.tensor([0, 71, 150])
    return {
        "decoded": lambda: nk.matmul(x, w[0]),
        "FP4": lambda: _triton_block_scaled.multiply(side(a), side(b), None, out, False, "mma.sync") or out.clone(),
        "rows": lambda: grouped_matmul(x, Stack(w), offsets, torch.float32),
        "many rows": lambda: grouped_matmul(many, Stack(w[:2, :40, :130].bfloat16()), halves, torch.float32),
        "sums": lambda: grouped_matmul(dy.t(), x.t(), offsets, torch.float32),
    }


@interpreted
@pytest.mark.parametrize("name", ["decoded", "FP4", "rows", "many rows", "sums"])
def test_tiles_of_a_product_give_the_same_bits(name, steady_dot, monkeypatch):
    monkeypatch.setattr(_device, "multiprocessors", lambda device: 1)  # for one program, or two, in all that stay
    monkeypatch.setattr(
        _triton_tiles, "PROGRAMS", 6
    )  # so that splits would go by the number of tiles, if they were asked
    run = products()[name]
    with nk.backend("triton"):
        with _tuned.trying({}) as asked:
            expected = run().clone()
        ((question, answers),) = asked.items()
        assert answers == CHANGES + {"rows": STAYING, "many rows": (*STAYING, HALF)}.get(name, ())
        for change in answers[1:]:
            with _tuned.trying({question: change}):
                assert torch.equal(run(), expected), change
            if "programs" in change:
                with _tuned.trying({question: change}), _triton.recorded() as launches:
                    run()
                assert launches[0][-1] == (change["programs"],)
        if name in ("decoded", "rows"):  # the others are exact, or one step
            with _tuned.trying({question: {"k": 64}}):
                assert not torch.equal(run(), expected), "another K must show, or nothing does"


@interpreted
@pytest.mark.parametrize("form", ["1x16", "16x16", "noise"])
def test_tiles_of_quantize_give_the_same_bits(form):
    row, col = {
        "1x16": (nk.QuantSpec(), None),
        "16x16": (nk.QuantSpec("16x16"), nk.QuantSpec("16x16")),
        "noise": (nk.QuantSpec("1x16", "stochastic"), nk.QuantSpec("1x16", "stochastic", 0xD7E8)),
    }[form]
    x, noise = torch.randn(34, 80).bfloat16(), torch.tensor([3, 5])
    with nk.backend("reference"):
        expected = nk.quantize_pair(x, row, col, noise)
    with nk.backend("triton"):
        with _tuned.trying({}) as asked:
            nk.quantize_pair(x, row, col, noise)
        ((question, answers),) = asked.items()
        for change in answers[1:]:
            with _tuned.trying({question: change}):
                found = nk.quantize_pair(x, row, col, noise)
            for mine, theirs in zip(found, expected, strict=True):
                if isinstance(theirs, nk.NVFP4Tensor):
                    assert torch.equal(mine.codes, theirs.codes), change
                    assert torch.equal(mine.scales.view(torch.uint8), theirs.scales.view(torch.uint8)), change


@interpreted
def test_every_question_has_a_case():
    """And where nothing was measured the first answer, which changes nothing, holds."""
    tiles_of, kinds = set(), set()
    for case in cases("cpu", small=True):
        run = case.makes["triton"]()
        with nk.backend("triton"), _tuned.trying({}) as asked:
            run()
        assert all(answers[0] == {} for answers in asked.values())
        tiles_of |= {question.split()[0] for question in asked}
        if "native" in case.makes:
            with _tuned.trying({}) as asked:
                run()
            kinds |= {question.split(":")[0] for question, answers in asked.items() if answers[0] is None}
    assert tiles_of == {"matmul", "quantize", "selective_scan", "grouped_matmul"}
    assert kinds == set(_tuned.KINDS)


def call(m=4):
    x = torch.randn(m, 32)
    return lambda: nk.quantize(x)


@interpreted
@pytest.mark.parametrize("fast", ["native", "triton"])
def test_the_faster_backend_serves(fast, monkeypatch):
    found = backends(
        Case("quantize", dict(triton=call, native=call)), lambda run: 1.0 if _dispatch.forced(fast) else 2.0
    )
    assert found == {
        "quantize: 1 forms": entry(fast, triton=1e6 * (1 + (fast != "triton")), native=1e6 * (1 + (fast != "native")))
    }
    assert _dispatch.candidates("quantize", QUANTIZE) == _dispatch.TABLE["quantize"]
    _tuned.save(CHIP, found)
    others = [name for name in _dispatch.TABLE["quantize"] if name != fast]
    assert _dispatch.candidates("quantize", QUANTIZE) == (fast, *others)
    assert _dispatch.candidates("quantize", (*QUANTIZE[:2], *QUANTIZE[1:3])) == _dispatch.TABLE["quantize"]
    for name in ("native", "triton"):
        monkeypatch.setattr(_dispatch.implementation("quantize", name), "refuses", lambda *call: None)
    assert _dispatch.select("quantize", *QUANTIZE) is _dispatch.implementation("quantize", fast)
    with nk.backend("reference"):
        assert _dispatch.candidates("quantize", QUANTIZE) == ("reference",)


@interpreted
def test_a_backend_that_is_wrong_or_refuses_is_no_answer(capsys):
    wrong = Case("quantize", dict(triton=call, native=lambda: lambda: nk.quantize(torch.ones(4, 32))))
    assert backends(wrong, lambda run: 1.0) == {} and "differ" in capsys.readouterr().err

    def doubles():
        return lambda: nk.causal_conv1d(torch.ones(1, 4, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64))

    assert backends(Case("float64", dict(triton=doubles, native=doubles)), lambda run: 1.0) == {}


@interpreted
@pytest.mark.parametrize("n, expected", [(1.0, {"n": 64}), (1.92, {})])
def test_the_fastest_tile_of_those_with_the_same_bits(n, expected, steady_dot, monkeypatch, capsys):
    def seconds(run):
        given = next(iter(_tuned.trial[0].values()))
        if given == {"stages": 4}:
            raise MemoryError("too large for the chip")
        return {"k": 0.1, "n": n + given.get("n", 0) / 1000, "stages": 1.99}.get(next(iter(given), None), 2.0)

    monkeypatch.setattr(_triton_decoded, "CHANGES", (*CHANGES, {"k": 64}))
    a, b = torch.randn(4, 300), nk.quantize(torch.randn(20, 300))
    case = Case("matmul", {"triton": lambda: lambda: nk.matmul(a, b)})
    ((question, found),) = tiles(case, seconds).items()
    assert question == "matmul float32 nvfp4 Tile(m=16, n=64, k=32, warps=4, stages=2)"
    told = capsys.readouterr().err
    assert found["answer"] == expected and "too large for the chip" in told and "{'k': 64}: other bits" in told
    assert list(found["us"]) == ["{}", '{"stages": 2}', '{"n": 64}', '{"n": 128}']


def first():
    _tuned._tables.clear()  # as a new process
    return _dispatch.candidates("quantize", QUANTIZE)[0]


FOUND = {"quantize: 1 forms": entry("triton", triton=1.0, native=2.0)}


def test_what_was_found_is_kept_for_these_sources_alone(monkeypatch):
    assert first() == "native"
    _tuned.save(CHIP, FOUND)
    _tuned.save(CHIP, {"another": entry({}, first=1.0)})
    assert first() == "triton"
    assert _tuned.entries("meta")["quantize: 1 forms"] == FOUND["quantize: 1 forms"] | {
        "from": "nvfp4 tune on this machine"
    }
    assert _tuned.path(CHIP).name == "tuned-some-gpu-1.json"
    for name, value, expected in (("NVFP4_TUNED", "0", "native"), ("NVFP4_TUNED", "1", "triton")):
        monkeypatch.setenv(name, value)
        assert first() == expected
    monkeypatch.setattr(_device, "chips", lambda: [_device.Chip("meta", "Another", "sm_90", "")])
    assert first() == "native"
    monkeypatch.setattr(_device, "chips", lambda: [CHIP])
    monkeypatch.setattr(_tuned, "source", lambda: "other sources")
    assert first() == "native"
    _tuned.save(CHIP, {"another": entry({}, first=1.0)})
    assert set(_tuned.entries("meta")) == {"another"}


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b"{}", b'{"answers": 3}', b'{"answers": {"quantize: 1 forms": 7}}'],
)
def test_a_file_that_nvfp4_tune_did_not_write_is_ignored(content):
    _tuned.path(CHIP).write_bytes(content)
    with pytest.warns(UserWarning, match="is not what nvfp4 tune writes"):
        assert first() == "native"
    with pytest.warns(UserWarning):
        _tuned.save(CHIP, FOUND)
    assert first() == "triton"


@pytest.mark.parametrize("answer", ["cublas", 7, None, {}, ["native"], {"k": 32}])
def test_an_answer_that_is_not_on_the_list_is_ignored(answer):
    _tuned.save(CHIP, {"quantize: 1 forms": entry(answer), "a kernel 3": entry(answer)})
    assert first() == "native"
    assert _tuned.answer(QUANTIZE[0].device, ({"n": 1}, {"n": 2}), lambda: "a kernel 3") == {"n": 1}


def test_many_writers_and_a_reader():
    """Whatever is read at any time is whole."""
    _tuned.save(CHIP, FOUND)
    many = {f"question {i}": entry("native", native=1.0) for i in range(300)}
    threads = [threading.Thread(target=lambda: [_tuned.save(CHIP, FOUND | many) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert json.loads(_tuned.path(CHIP).read_text())["answers"]["quantize: 1 forms"]["answer"] == "triton"
    assert set(_tuned.entries("meta")) == set(FOUND | many) and len(list(_tuned.path(CHIP).parent.iterdir())) == 1


def test_a_result_becomes_the_default_of_its_architecture(tmp_path):
    (tmp_path / "results").mkdir()
    _tuned.save(CHIP, FOUND)
    results = bench.store(tmp_path, [], parts=False)
    _tuned.path(CHIP).unlink()
    assert first() == "native" and command.save_default(results) == tmp_path / "sm_90.json"
    assert first() == "triton"
    assert _tuned.entries("meta")["quantize: 1 forms"]["from"] == "benchmarks/results/some-gpu-1.json"
    _tuned.save(CHIP, {"quantize: 1 forms": entry("native", native=1.0, triton=2.0)})
    assert first() == "native", "what this machine says goes before"
    results.write_text(json.dumps({"device": CHIP.name, "arch": "sm_90", "rows": []}))  # as nvfp4 bench writes on a CPU
    with pytest.raises(ValueError, match="save-default: .* holds nothing tuned"):
        command.save_default(results)


def test_a_weight_is_packed_where_cuda_is_not_known_to_be_slower(monkeypatch):
    cpu = _device.Chip("cpu", "Some CPU", "cpu", "")
    monkeypatch.setattr(_device, "chips", lambda: [cpu])
    monkeypatch.setattr(_cuda, "takes", lambda x: True)
    monkeypatch.setattr(_dispatch.implementation("matmul", "native"), "refuses", lambda *call: None)
    weight = nk.quantize(torch.ones(16, 32))
    assert packed(weight, torch.bfloat16) is not None
    _tuned.save(cpu, {"matmul: bfloat16 x NVFP4Tensor, few rows": entry("triton", triton=1.0, native=2.0)})
    assert packed(weight, torch.bfloat16) is None
    assert packed(weight, torch.float16) is not None, "of which nothing was measured"


def test_info_and_plan_say_what_is_measured_and_by_whom(monkeypatch):
    assert "meta, choices measured: none; nvfp4 tune measures them" in info.render(info.collect())
    _tuned.save(CHIP, {"quantize: 2 forms, stochastic, rotated": entry("triton", triton=1.0, native=2.0)})
    report = info.collect()
    assert list(report["ops"]["meta"]["quantize"]) == ["triton", "native", "reference"]
    told = info.render(report)
    assert "meta, choices measured: 1\nquantize: 2 forms, stochastic, rotated: " in told
    assert told.endswith('"triton", by nvfp4 tune on this machine')
    cpu = _device.Chip("cpu", "Some CPU", "cpu", "")
    monkeypatch.setattr(_device, "chips", lambda: [cpu])
    _tuned.save(cpu, {"quantize: 1 forms": entry("reference", reference=1.0)})
    x = torch.ones(4, 32)
    assert plan._taken("quantize", x, nk.QuantSpec(), None, None).startswith("reference (measured by nvfp4 tune; ")
    assert "measured" not in plan._taken("quantize", x, nk.QuantSpec(), nk.QuantSpec(), None)


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(_device, "chips", lambda: [_device.Chip("cpu", "Some CPU", "cpu", "")])
    assert main(["tune"]) == 0 and "no GPU here" in capsys.readouterr().out
    monkeypatch.setattr(_triton, "missing", None)
    assert main(["tune", "--rehearse", "--seconds", "0"]) == 0
    assert "no time left for the backends of quantize" in capsys.readouterr().out


def test_without_triton_there_is_nothing_to_tune(capsys, monkeypatch):
    monkeypatch.setattr(_triton, "missing", "Triton is not installed")
    for argv in (["tune"], ["tune", "--rehearse"]):
        assert main(argv) == 0
        assert capsys.readouterr().out == "Triton is not installed, so there is nothing to tune\n"
    assert not _tuned.path(CHIP).exists()


@interpreted
def test_the_command_goes_on_after_an_error(capsys, monkeypatch):
    found = []
    quantize, broken = Case("quantize", dict(native=call, triton=call)), Case("broken", dict(triton=lambda: 1 / 0))
    monkeypatch.setattr("nvfp4_kernels.tune.cases.cases", lambda device, small: [broken, quantize])
    command.tune("cpu", True, lambda run: 1.0, found.append, None)
    assert [set(each) for each in found] == [
        {"quantize: 1 forms"},
        {"quantize 1x16:nearest None Tile(rows=4, cols=32, warps=1)"},
    ]
    out, err = capsys.readouterr()
    assert 'quantize: 1 forms: "native" of native 1,000,000.0 us' in out and "broken: ZeroDivisionError" in err
