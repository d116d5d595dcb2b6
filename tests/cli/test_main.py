"""The command line: no torch before a command runs, one-line errors with a way out, nothing left behind by a refusal."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nvfp4_kernels.cli import machine
from nvfp4_kernels.cli import main as cli
from nvfp4_kernels.cli.train import FLAGS, settings_of
from nvfp4_kernels.train.settings import Settings

ROOT = Path(__file__).parents[2]


def run(capsys, *argv):
    status = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err


def test_parser_and_help_load_neither_torch_nor_numpy():
    code = (
        "import sys; from nvfp4_kernels.cli import main; main.build_parser();"
        "print([m for m in ('torch', 'numpy', 'tqdm', 'matplotlib') if m in sys.modules])"
    )
    got = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert got.stdout == "[]\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "example:" in text


def test_every_setting_has_a_flag_with_unit_default_and_example(capsys):
    fields = set(Settings.__dataclass_fields__)
    assert fields - set(FLAGS) == {"checkpoint_activations", "shard"} and set(FLAGS) <= fields
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, (_, _, unit, _, example) in FLAGS.items():
        flag = "--" + name.rstrip("_").replace("_", "-")
        assert f"{flag} {unit.upper()}" in text and f"e.g. {flag} {example}" in text, flag
        assert (
            "default" in text.split(f"{flag} {unit.upper()} ")[1].split(" e.g. ")[0]
            or name == "config"
            or name in ("minutes", "out")
        ), flag


@pytest.mark.parametrize("argv, message", [
    (["trian"], "unknown command trian; nearest: train"),
    (["train", "--lenght", "5"], "unknown flag --lenght of nvfp4 train; nearest: --length"),
    (["train", "--bacth=5"], "unknown flag --bacth of nvfp4 train; nearest: --batch"),
    (["info", "extra"], "unexpected argument extra of nvfp4 info"),
    (["train", "--steps", "ten"], "--steps: got 'ten'; allowed: a whole number"),
    (["train", "--steps"], "--steps: expected one argument"),
    (["train", "--recipe", "fp8"], "--recipe: invalid choice: 'fp8'"),
    (["train", "--batch", "0"], "batch: got 0; allowed: at least 1"),
    (["train", "--lr", "0"], "lr: got 0.0; allowed: more than 0"),
    (["train", "--steps", "5", "--minutes", "1"], "minutes: got --steps too; allowed: one of them"),
    (["train", "--validation", "0.7"], "validation: got 0.7"),
    (["train", "--data", "/no/such/file"], "/no/such/file does not exist; do: "),
    (["train", "--tokenizer", "/no/tokenizer.json"], "tokenizer: got /no/tokenizer.json"),
    (["train", "--config", "/no/config.json"], "/no/config.json does not exist; do: "),
    (["train", "--resume"], "holds no run"),
    (["generate", "--model", "/no/run"], "holds no run"),
    (["generate"], "--model"),
    (["bench", "--op", "nothing"], "op: got 'nothing'; allowed: "),
    (["bench", "--folder", "."], "holds no bench_*.py; do: name the benchmarks"),
    (["plan", "--tokens", "many"], "--tokens: got 'many'; allowed: a whole number"),
    (["demo", "--minutes", "2m"], "--minutes: got '2m'; allowed: a number"),
    (["check", "--op", "relu2", "--out", "no/file.json"], "out: no/file.json cannot be written, no is no folder; do: "),
    (["eval", "--model", "x", "--text", "y", "--json", "."], "json: . is a folder; do: name another file"),
    ([], "COMMAND"),
])  # fmt: skip
def test_wrong_use_is_one_line_with_a_way_out(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *argv)
    assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == []


def write_bad_data(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "float.npy", np.zeros(9))
    np.save(tmp_path / "large.npy", np.full(9999, 300, np.uint16))
    (tmp_path / "odd.bin").write_bytes(b"abc")


@pytest.mark.parametrize("name, message", [
    ("empty.txt", "is empty; do: "), ("binary.txt", "is binary, not text; do: "), ("folder", "holds no file; do: "),
    ("short.txt", "(do: give more text"), ("float.npy", "allowed: one axis of uint8"),
    ("large.npy", "got id 300 at position 0"), ("odd.bin", "--bin-dtype"),
])  # fmt: skip
def test_bad_data_is_one_line_and_leaves_no_run(name, message, capsys, tmp_path):
    write_bad_data(tmp_path)
    status, out, err = run(capsys, "train", "--data", tmp_path / name, "--steps", 2, "--out", tmp_path / "run")
    assert status == 2 and out == "" and err.startswith("error: data: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "run").exists()


def test_bad_config_is_one_line(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{")
    _, _, err = run(capsys, "train", "--config", tmp_path / "config.json", "--out", tmp_path / "run")
    assert err.startswith("error: ") and "not a JSON file" in err and err.count("\n") == 1


def test_traceback_only_when_asked(capsys, monkeypatch):
    monkeypatch.setattr("nvfp4_kernels.cli.info.collect", lambda: {}["missing"])
    status, _, err = run(capsys, "info")
    assert (
        status == 2
        and err == "error: KeyError: 'missing'; do: run it again with NVFP4_DEBUG=1 and report the traceback\n"
    )
    monkeypatch.setenv("NVFP4_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.main(["info"])


def test_print_config(capsys, tmp_path):
    status, out, _ = run(capsys, "train", "--print-config", "--batch", 3, "--out", tmp_path / "run")
    got = json.loads(out)
    assert status == 0 and got["settings"]["batch"] == 3 and got["model"]["hybrid_override_pattern"]
    assert Settings(**got["settings"]).out == str(tmp_path / "run") and not (tmp_path / "run").exists()


def parsed(*argv) -> Settings:
    return settings_of(cli.parse(["train", *map(str, argv)]))


def test_settings_come_from_flags_then_preset(tmp_path):
    assert parsed("--preset", "small").length != parsed("--preset", "tiny").length
    assert parsed("--length", 99).length == 99
    assert parsed("--minutes", 2).steps is None and parsed().out == "runs/tiny-nvfp4"
    assert parsed("--recipe", "bf16").out == "runs/tiny-bf16" and parsed("--ablate").out == "runs/tiny-ablation"


def test_a_resumed_run_keeps_what_made_it(tmp_path):
    saved = Settings(batch=3, minutes=10, out=str(tmp_path))
    (tmp_path / "run.json").write_text(saved.to_json())
    assert parsed("--resume", "--out", tmp_path) == saved
    assert parsed("--resume", "--out", tmp_path, "--steps", 20) == saved.replace(steps=20, minutes=None)
    with pytest.raises(ValueError, match="batch: got 4; allowed: 3, what the run began with"):
        parsed("--resume", "--out", tmp_path, "--batch", 4)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        parsed("--resume", "--out", tmp_path)


def test_threads_sleep_only_where_others_want_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert 0 <= machine.share_of_idle_cpu(0.01) <= 1
    for idle, policy in ((0.9, None), (0.2, "PASSIVE")):
        monkeypatch.setattr(machine, "share_of_idle_cpu", lambda idle=idle: idle)
        machine.share_the_cores()
        assert os.environ.get("OMP_WAIT_POLICY") == policy
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    machine.share_the_cores()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's allocator")
def test_freed_memory_is_used_again_unless_the_user_limits_it(limited):
    code = (
        "import ctypes, resource; from nvfp4_kernels.cli import machine; machine.keep_freed_memory()\n"
        "libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p; size = 128 << 20\n"
        "for turn in range(3):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    block = libc.malloc(ctypes.c_size_t(size)); ctypes.memset(block, 1, size); libc.free(ctypes.c_void_p(block))\n"
        "    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "print(faults)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"MALLOC_ARENA_MAX": "4"} if limited else {}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert (int(done.stdout) < 32) == (not limited)  # with huge pages 64 faults, else 32,768


def test_a_system_without_one_c_library_keeps_its_allocator(monkeypatch):
    def none(name):
        raise TypeError("argument of type 'NoneType' is not iterable")  # of Windows

    monkeypatch.setattr(ctypes, "CDLL", none)
    machine.keep_freed_memory()
