"""The house rules, checked: imports run down, the dispatch table equals the tree, files stay short."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nvfp4_kernels.ops import _dispatch

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nvfp4_kernels"
STOREYS = {
    "formats": 1,
    "ops": 2,
    "recipe": 3,
    "autograd": 4,
    "nn": 5,
    "compat": 5,
    "model": 6,
    "checkpoint": 7,
    "train": 8,
    "generate": 8,
    "ptq": 8,
    "testing": 8,
    "tune": 8,
    "api": 9,
    "cli": 10,
    "__main__": 11,
    "__init__": 11,
}
SOURCES = sorted(p for p in PACKAGE.rglob("*.py"))
CSRC = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu"))


def room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py") if parts else "__init__"


def imported_rooms(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nvfp4_kernels"):
            rest = node.module.split(".")[1:]
            yield from [room(tuple(rest))] if rest else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("nvfp4_kernels"):
                    yield room(tuple(alias.name.split(".")[1:]))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_down(path):
    here = room(path.relative_to(PACKAGE).parts)
    for there in imported_rooms(path):
        if there in (here, "__version__", "_native") or there == "api" and here in ("__init__", "cli"):
            continue
        assert there in STOREYS, f"{path.name} imports {there}, a room without a storey"
        assert STOREYS[there] < STOREYS[here], f"{path.relative_to(ROOT)} ({here}) imports {there}"


def test_table_is_the_tree():
    tree = {p.name for p in (PACKAGE / "ops").iterdir() if p.is_dir() and not p.name.startswith("_")}
    assert tree == set(_dispatch.TABLE)
    for op, names in _dispatch.TABLE.items():
        folder = PACKAGE / "ops" / op
        columns = {p.stem for p in folder.iterdir() if not p.name.startswith("_")} - {"op"}
        assert columns == set(names), op
        assert (folder / "op.py").exists(), op
        assert names[-1] == "reference", f"{op}: the reference is the last resort"


def test_each_implementation_refuses_and_runs():
    for op, names in _dispatch.TABLE.items():
        for name in names:
            module = ast.parse((PACKAGE / "ops" / op / f"{name}.py").read_text())
            assert {"refuses", "run"} <= {n.name for n in module.body if isinstance(n, ast.FunctionDef)}, (op, name)


@pytest.mark.parametrize("path", SOURCES + CSRC, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


def test_no_twins():
    """No ten lines of code stand in the tree twice: comments, imports and argument lists aside."""
    seen, width = {}, 10
    aside = re.compile(r"#|//|import |from |\w+(: [^=]+)?( = \S+)?,$")
    for path in SOURCES + CSRC:
        lines = [line.strip() for line in path.read_text().splitlines()]
        code = [line for line in lines if len(line) > 3 and not aside.match(line)]
        for i in range(len(code) - width + 1):
            window = tuple(code[i : i + width])
            assert seen.setdefault(window, (path, i)) == (path, i), (
                f"{path} repeats {seen[window][0]}: {window[0]!r} ..."
            )


def test_no_code_in_package_files():
    for path in SOURCES:
        if path.name == "__init__.py" and path.parent != PACKAGE:
            assert path.read_text() == "", f"{path.relative_to(ROOT)} holds code"


def test_no_torch_header_in_csrc():
    assert CSRC, "csrc is gone"
    for path in CSRC:
        assert not re.search(r'#include\s*[<"](torch|ATen|c10|cuda_fp[48])', path.read_text()), path


def test_capability_tests_live_in_one_file():
    capability = re.compile(r"get_device_capability|is_available\(\)|__builtin_cpu_supports|compute_capability")
    for path in SOURCES:
        if path.name != "_device.py":
            assert not capability.search(path.read_text()), path.relative_to(ROOT)


def test_new_tensors_name_their_device():
    """In ops and autograd: torch's default device is the user's affair, and what a kernel writes lies where its inputs do."""
    makers = {"empty", "empty_strided", "zeros", "ones", "full", "arange", "tensor"}
    for path in SOURCES:
        if path.relative_to(PACKAGE).parts[0] in ("ops", "autograd"):
            for call in ast.walk(ast.parse(path.read_text())):
                name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
                if name.startswith("torch.") and name.removeprefix("torch.") in makers:
                    given = {k.arg for k in call.keywords}  # None: of **
                    assert given & {"device", None}, f"{path.relative_to(ROOT)}:{call.lineno}"


def test_inline_ptx_lives_in_one_place():
    """csrc/arch/ptx.cuh, and beside it a file for the instructions that an architecture alone has."""
    for path in CSRC:
        if path.suffix in (".cuh", ".cu") and not (path.parent.name == "arch" and path.name.startswith("ptx")):
            assert not re.search(r"\basm\b", path.read_text()), path


def test_package_import_is_light():
    """`import nvfp4_kernels` and the command line's parser bring in no torch, so that --help is instant."""
    code = "import nvfp4_kernels, nvfp4_kernels.cli.main, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_exist():
    import nvfp4_kernels
    from nvfp4_kernels import api

    for name in api.__all__:
        assert getattr(nvfp4_kernels, name) is getattr(api, name)


def test_no_machine_or_registry_in_the_tree():
    """No absolute home path and no package registry's address in any tracked file."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    banned = re.compile("|".join(["/ho" + "me/", "/ro" + "ot/", "pypi" + r"\.", "index" + "-url", "/tm" + "p/"]))
    for name in listed.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".cpp", ".h", ".cu", ".json", "") and path.is_file():
            assert not banned.search(path.read_text(errors="ignore")), name
