"""The CUDA kernels as nvcc and NVRTC compile them, without a GPU: no warning, no spill, the instructions they are for."""

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from math import prod
from types import SimpleNamespace

import pytest
import torch

import nvfp4_kernels as nk
from nvfp4_kernels.ops import _cuda, _dispatch, _nvrtc
from nvfp4_kernels.ops.matmul import _cuda as matmul
from nvfp4_kernels.ops.matmul import _cuda_sm120 as matmul_sm120
from nvfp4_kernels.ops.matmul import native as matmul_native

ARCHS = ("80", "90a", "100a", "103a", "120f")
# What nvcc compiles: any change would show in one of these, and an op takes it some 7 seconds an architecture. NVFP4_CUDA=1, as
# for `make cuda`, asks for all of them; benchmarks/results/resources.json has all, and NVRTC compiles all below.
CHOSEN = [("quantize", "100a"), ("matmul", "80"), ("state_update", "90a"), ("mixer_scan", "90a")]
ALL = [(op, arch) for op in ("quantize", "matmul", "state_update") for arch in ARCHS]
ALL += [("mixer_scan", arch) for arch in ARCHS[1:]]  # clusters
TASKS = ALL if os.environ.get("NVFP4_CUDA", "0") not in ("", "0") else CHOSEN


@pytest.fixture(scope="module")
def compiled(resources):
    """{(op, arch): {kernel: row}}"""
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda task: {row["kernel"]: row for row in resources.rows(*task)}, TASKS)
        return dict(zip(TASKS, made, strict=True))


@pytest.mark.parametrize("op, arch", TASKS)
def test_no_spills(compiled, resources, op, arch):
    rows = compiled[op, arch].values()
    told = [row for row in json.loads(resources.RESULTS.read_text()) if (row["op"], row["case"]) == (op, "CUDA")]
    committed = {row["kernel"]: row["shared"] for row in told if row["arch"] == int(arch.rstrip("af"))}
    assert committed == {row["kernel"]: row["shared"] for row in rows}  # registers are another with each ptxas
    of_matmul = {"80": 5, "90a": 9, "100a": 8, "103a": 8, "120f": 6}[arch]
    of_scan = 1 if arch == "120f" else 3
    assert len(rows) == {"quantize": 18, "matmul": of_matmul, "state_update": 15, "mixer_scan": of_scan}[op]
    assert not [row["kernel"] for row in rows if row["spills"]]
    most = {"120f": 99}.get(arch, 163) << 10
    chips_own = [row for row in rows if row["kernel"].startswith(("weight_only_tiles", "tcgen05", "mixer_scan"))]
    assert all(row["shared"] <= (99 if arch == "120f" else 227) << 10 for row in chips_own)
    assert all(row["shared"] <= most for row in rows if row not in chips_own)


@pytest.mark.parametrize("op, arch", [task for task in TASKS if task[0] != "state_update"])
def test_instructions(compiled, op, arch):
    for name, row in compiled[op, arch].items():
        found = row["instructions"]
        if re.fullmatch(r"weight_only_\d+", name):
            # a step's eight tiles of 16 rows and 16 k for each warp, times the groups of 8 tokens
            assert found["HMMA"] >= 2 * int(name.rsplit("_", 1)[1]) and found["LDGSTS"] >= 13, name
        elif op == "mixer_scan":  # a square of scores, C S, scores x, 16 tokens' update of the state
            assert found["HMMA"] == 16 + 64 + 20 + 16, name
        elif name == "quantize_row_bf16":
            # two blocks of 16 codes a thread, two codes an instruction, and each block's scale, where there is one; for each
            # scale a pair of bf16
            codes, scales = 16 * (arch[:2] in ("10", "12")), 2 * (arch != "80")
            assert found["F2FP"] == codes + scales + 1, name


OWN = {"weight_only_tiles": "HGMMA", "tcgen05": "UTCOMMA", "block_scaled": "OMMA", "mixer_scan": "HMMA"}


@pytest.mark.parametrize("name, instruction", OWN.items())
def test_tensor_cores(resources, compiled, name, instruction):
    """In the committed table, and where it is compiled here: the products that each chip has of its own."""
    rows = [row for row in json.loads(resources.RESULTS.read_text()) if row["case"] == "CUDA"]
    rows += [row for found in compiled.values() for row in found.values()]
    found = [row["instructions"] for row in rows if row["kernel"].startswith(name)]
    assert found and all(instruction in instructions for instructions in found)


def test_refusal_without_a_compiler(monkeypatch):
    """A CUDA device, and neither nvcc's code nor CuPy: the reason says what to do."""
    monkeypatch.setattr(_cuda, "BUILT", _cuda.BUILT / "nowhere")
    monkeypatch.setattr(_cuda._device, "cuda_target", lambda device: "90a")
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    _nvrtc.missing.cache_clear()
    _cuda._refusal.cache_clear()
    try:
        reason = _cuda._refusal("quantize", "a device")
    finally:
        _nvrtc.missing.cache_clear()
        _cuda._refusal.cache_clear()
    assert "NVFP4_CUDA=1" in reason and "[cuda12]" in reason


def test_refusal_of_code_that_the_driver_does_not_load(monkeypatch):
    """As of a compiler newer than the driver: the reason is the driver's, and another backend takes the call. What may be
    otherwise the next time is an error and no reason."""
    statuses = [900, 222, 0]
    driver = SimpleNamespace(
        cuCtxGetCurrent=lambda context: setattr(context._obj, "value", 1) or 0,
        cuModuleLoadData=lambda module, code: statuses.pop(0),
        cuGetErrorString=lambda status, text: 0,
    )
    monkeypatch.setattr(_cuda, "_driver", lambda: driver)
    monkeypatch.setattr(_cuda, "_built", lambda op, arch: None)
    monkeypatch.setattr(_cuda._device, "cuda_target", lambda device: "90a")
    monkeypatch.setattr(_nvrtc, "missing", lambda: None)
    monkeypatch.setattr(_nvrtc, "compiled", lambda op, arch: b"code")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    _cuda._refusal.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="quantize: CUDA driver error 900"):
            _cuda._refusal("quantize", torch.device("cuda", 0))
        assert _cuda._refusal("quantize", torch.device("cuda", 0)).startswith("quantize: CUDA driver error 222")
        assert _cuda._refusal("matmul", torch.device("cuda", 0)) is None and not statuses
    finally:
        _cuda._refusal.cache_clear()
        _cuda._module.cache_clear()


def test_targets(monkeypatch):
    found = {}
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)):
        with _cuda._device.assumed(capability):
            found[capability] = _cuda._device.cuda_target(SimpleNamespace(type="meta"))
    assert list(found.values()) == [None, "80", "80", "90a", "100a", "103a", None, "120f", "120f"]


def test_what_the_driver_is_asked(monkeypatch):
    """A context where the thread has none, the attribute that more than 48 KB need, the launch as given; errors by name."""
    calls, device = [], torch.device("cuda", 1)

    class Driver:
        def __getattr__(self, name):
            return lambda *given: calls.append((name, given)) or (98 if name == failing else 0)

    monkeypatch.setattr(_cuda, "_driver", Driver)
    monkeypatch.setattr(_cuda, "_module", lambda op, device: op)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    for shared, failing in ((100, None), (60000, None), (60001, "cuLaunchKernel")):
        calls.clear()
        _cuda._function.cache_clear()
        try:
            _cuda.launch("quantize", "kernel", (3, 2), 128, shared, b"parameters", SimpleNamespace(device=device))
        except RuntimeError as error:
            assert failing and "kernel: CUDA driver error 98" in str(error)
        names = [name for name, _ in calls]
        assert names[:4] == ["cuCtxGetCurrent", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuModuleGetFunction"]
        assert ("cuFuncSetAttribute" in names) == (shared > 49152)
        _, grid_x, grid_y, grid_z, *block, dynamic, stream, _, extra = dict(calls)["cuLaunchKernel"]
        assert (grid_x, grid_y, grid_z, block, dynamic, stream.value, extra) == (3, 2, 1, [128, 1, 1], shared, 7, None)
    _cuda._function.cache_clear()
    assert names[-1] == "cuGetErrorString"


def test_counters_of_launches_that_may_run_beside_each_other(monkeypatch):
    """A stream has a row of its own, and another in each graph; nothing is allocated, in a graph's memory or elsewhere, until
    no row is left."""
    device, now = torch.device("cuda", 0), SimpleNamespace(cuda_stream=0, graph=None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.graph is not None)
    monkeypatch.setattr(_cuda, "recording", lambda stream: now.graph)
    monkeypatch.setattr(_cuda, "variable", lambda op, name, device: 1 << 20)
    monkeypatch.setattr(matmul, "_rows", {})
    monkeypatch.setattr(matmul, "_next_row", itertools.count())
    monkeypatch.setattr(torch, "zeros", lambda count, **options: torch.ones(count))
    rows, each = matmul.COUNTERS
    places = {}
    for key in [(stream, graph) for graph in (None, 1, 2) for stream in (0, 7)] * 2:
        now.cuda_stream, now.graph = key
        assert places.setdefault(key, matmul.zeros(each, device)) == matmul.zeros(1, device)
    assert sorted(places.values()) == [(1 << 20) + 4 * each * row for row in range(6)]
    assert len(matmul.zeros(each + 1, device)) == each + 1
    now.graph = 3
    monkeypatch.setattr(matmul, "_next_row", itertools.count(rows - 1))
    assert matmul.zeros(each, device) == (1 << 20) + 4 * each * (rows - 1)
    now.graph = 4
    assert len(matmul.zeros(each, device)) == each
    most = max(*matmul.BLOCKS.values(), matmul_sm120.BLOCKS)
    assert most // 2 <= each  # tiles that are shared out: two blocks each, at least


def test_a_variable_and_a_recording(monkeypatch):
    asked = []

    class Driver:
        def __getattr__(self, name):
            def answer(*given):
                asked.append((name, given))
                if name == "cuModuleGetGlobal_v2":
                    given[0]._obj.value = 4096
                if name == "cuStreamGetCaptureInfo_v2":
                    given[2]._obj.value = 9
                return 0

            return answer

    monkeypatch.setattr(_cuda, "_driver", Driver)
    monkeypatch.setattr(_cuda, "_module", lambda op, device: op)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    _cuda.variable.cache_clear()
    assert _cuda.variable("matmul", "a name", torch.device("cuda", 1)) == 4096 and _cuda.recording(7) == 9
    _cuda.variable.cache_clear()
    name, given = asked[-2]
    assert name == "cuModuleGetGlobal_v2" and given[2:] == ("matmul", b"a name")
    name, given = asked[-1]
    assert name == "cuStreamGetCaptureInfo_v2" and (given[0].value, given[3:]) == (7, (None, None, None))


class Stub:
    """In NVRTC's place: compiles to the options and the source's length, and counts."""

    NVRTCError = type("NVRTCError", (RuntimeError,), {})

    def __init__(self, fails=False):
        self.made, self.fails, self.version = [], fails, (13, 0)

    def getVersion(self):
        return self.version

    def createProgram(self, source, *rest):
        return source

    def compileProgram(self, source, options):
        if self.fails:
            raise self.NVRTCError
        self.made.append(options)

    def getCUBIN(self, source):
        return f"{self.made[-1][0]} {len(source)}".encode()

    def getProgramLog(self, source):
        return "some note\nx.h(3): error: no such thing\n"

    def destroyProgram(self, source):
        pass


@pytest.fixture
def stub(monkeypatch, tmp_path):
    made = Stub()
    monkeypatch.setenv("NVFP4_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_nvrtc, "_nvrtc", lambda: made)
    return made


def test_cache_by_source_and_architecture(stub, monkeypatch, tmp_path):
    first = _nvrtc.compiled("quantize", "90a")
    assert first.startswith(b"-arch=sm_90a ") and "--fmad=false" in stub.made[0]
    assert _nvrtc.compiled("quantize", "90a") == first and len(stub.made) == 1
    _nvrtc.compiled("quantize", "120f")
    assert len(stub.made) == 2
    shutil.copytree(_nvrtc.CSRC, tmp_path / "csrc")
    monkeypatch.setattr(_nvrtc, "CSRC", tmp_path / "csrc")
    _nvrtc.compiled("quantize", "90a")
    assert len(stub.made) == 2
    with open(tmp_path / "csrc" / "numerics" / "e2m1.h", "a") as header:
        header.write("\n")
    _nvrtc.compiled("quantize", "90a")
    assert len(stub.made) == 3
    assert all(path.suffix == ".cubin" for path in (tmp_path / "cache").iterdir())


def test_a_compiler_that_does_not_know_families(stub):
    """torch 2.10 comes with NVRTC 12.8: it is asked for the chip itself."""
    made = {
        version: setattr(stub, "version", version) or _nvrtc.compiled("quantize", "120f")
        for version in ((12, 8), (12, 9))
    }
    assert [code.split()[0] for code in made.values()] == [b"-arch=sm_120a", b"-arch=sm_120f"]


def test_a_compiler_that_does_not_know_the_chip(stub):
    stub.version = (12, 8)
    with pytest.raises(RuntimeError, match=r"NVRTC 12.8 does not know sm_103a; allowed: 12.9 and newer"):
        _nvrtc.compiled("quantize", "103a")
    assert not stub.made


def test_cache_of_many_at_once(stub, tmp_path):
    """Whoever comes first: everybody reads a whole file."""
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: _nvrtc.compiled("matmul", "80"), range(32)))
    assert len(set(made)) == 1
    assert [path.read_bytes() for path in (tmp_path / "cache").iterdir()] == made[:1]


def test_an_error_is_told_and_not_cached(stub, tmp_path):
    stub.fails = True
    with pytest.raises(
        RuntimeError, match=r"csrc/matmul/cuda.cu: NVRTC 13.0 failed for sm_80: x.h\(3\): error: no such thing"
    ):
        _nvrtc.compiled("matmul", "80")
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def nvrtc():
    if _nvrtc.missing():
        pytest.skip(_nvrtc.missing())


@pytest.mark.parametrize("op, arch", ALL)
def test_nvrtc(nvrtc, by_nvrtc, op, arch):
    if arch == "103a" and _nvrtc._nvrtc().getVersion() < (12, 9):
        with pytest.raises(RuntimeError, match="does not know sm_103a"):
            _nvrtc.compile_source(op, arch)
        return
    code = by_nvrtc(op, arch).read_bytes()
    assert code[:4] == b"\x7fELF" and _nvrtc.whole(code[:-1]) == code == _nvrtc.whole(code)


def test_nvrtc_gives_what_the_tools_read(nvrtc, resources, by_nvrtc):
    """CuPy leaves out a cubin's last byte."""
    usage = resources.tool("cuobjdump", "--dump-resource-usage", str(by_nvrtc("mixer_scan", "120f")))
    assert re.findall(r"Function (\w+):\s*REG:\d+ STACK:0 ", usage) == ["mixer_scan_1x8"], usage


def test_sums_are_set_before_products_of_a_warpgroup(nvrtc):
    """Or ptxas before 12.9 has each of them wait for the one before: C7515, of which later ones say nothing."""
    ptx = _nvrtc.compile_source("matmul", "90a", ptx=True).decode()
    assert f".global .align 4 .b8 nvfp4_counters[{4 * prod(matmul.COUNTERS)}];" in ptx
    for rows in (128, 256):
        kernel = ptx[ptx.index(f".entry weight_only_tiles_{rows}") :]
        before, behind = kernel[: kernel.index("\n}\n")].split("wgmma.fence", 1)
        sums = set(re.findall(r"%f\d+", " ".join(re.findall(r"wgmma\.mma_async\S+ \{(.*?)\}", behind))))
        assert len(sums) >= rows // 2 and sums <= set(re.findall(r"mov\.(?:f32|b32)\s+(%f\d+),", before)), rows


@pytest.mark.parametrize(
    "arch, told, has",
    [
        (1000, "ARCH_SPECIFIC__", {"TCGEN05", "CONVERTS_TO_E2M1"}),
        (1000, "ARCH_FEAT_SM100_ALL", {"TCGEN05", "CONVERTS_TO_E2M1"}),  # NVRTC 12.8
        (1000, "ARCH_FAMILY_SPECIFIC__", {"CONVERTS_TO_E2M1"}),
        (1000, "ARCH__", set()),
        (1200, "ARCH_FEAT_SM120_ALL", {"MULTIPLIES_E2M1", "CONVERTS_TO_E2M1"}),  # NVRTC 12.8
        (1200, "ARCH_FAMILY_SPECIFIC__", {"MULTIPLIES_E2M1", "CONVERTS_TO_E2M1"}),
    ],
)
def test_instructions_of_a_target(arch, told, has):
    """By what compilers say of it, in their macros."""
    headers = [f"--include=arch/{name}.cuh" for name in ("ptx_pairs", "ptx_sm100", "ptx_sm120")]
    macros = ["-D__CUDACC__", f"-D__CUDA_{told}={arch}", f"-D__CUDA_ARCH__={arch}"]
    command = ["c++", "-E", "-dM", "-xc++", "-std=c++17", f"-I{_nvrtc.CSRC}", *macros, *headers, "/dev/null"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    of_targets = {"TCGEN05", "MULTIPLIES_E2M1", "CONVERTS_TO_E2M1"}
    assert {name for name in of_targets if f"#define NVFP4_{name} \n" in found} == has


def test_products_that_no_chip_has_proven_are_for_those_who_ask(monkeypatch):
    """NVFP4 times NVFP4 on Blackwell goes to Triton first; named, measured or in the host model, the handwritten kernel takes
    it."""
    kernels = SimpleNamespace(refuses=lambda *arguments: None)
    monkeypatch.setattr(matmul_native, "_on_gpu", lambda a, b: True)
    monkeypatch.setattr(matmul_native, "_cuda_kernels", lambda a, b: kernels)
    arguments = nk.quantize(torch.ones(1, 16)), nk.quantize(torch.ones(1, 16)), None, torch.float32, None, False
    assert "not yet run on such a chip" in matmul_native.refuses(*arguments)
    with monkeypatch.context() as measured:
        measured.setattr(_dispatch, "measured", lambda op, args: "native")
        assert matmul_native.refuses(*arguments) is None
    with nk.backend("native", "triton"):
        assert matmul_native.refuses(*arguments) is None
    monkeypatch.setattr(_cuda, "_model", print)
    assert matmul_native.refuses(*arguments) is None
    monkeypatch.setattr(_cuda, "_model", None)
    kernels.refuses = lambda *arguments: "a reason of its own"
    assert matmul_native.refuses(*arguments) == "a reason of its own"
