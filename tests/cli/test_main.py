"""The command line: no torch before a command runs, one-line errors with a way out, nothing left behind by a refusal."""

import ctypes
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nvfp4_kernels.cli import machine, quantize
from nvfp4_kernels.cli import main as cli
from nvfp4_kernels.cli.train import FLAGS, settings_of
from nvfp4_kernels.model.presets import preset
from nvfp4_kernels.ptq import formats
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
    (["train", "--recipe", "fp8"], "--recipe: got 'fp8'; allowed: nvfp4, nemotron3, bf16; nearest: nvfp4 (see nvfp4 train "),
    (["train", "--preset", "tini"], "allowed: tiny, small, nano-30b, super-120b, ultra-550b; nearest: tiny (see nvfp4 train "),
    (["plan", "--preset", "nano"], "; nearest: nano-30b"),
    (["quantize", "--model", "x", "--out", "y", "--recipe", "nano-fp9"], "--recipe: got 'nano-fp9'; allowed: super-nvfp4"),
    (["generate", "--model", "x", "--kv-cache", "fp16"], "--kv-cache: got 'fp16'; allowed: fp8, checkpoint"),
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
    (["generate", "--model", "x", "--prompt", "a\udcff"], r"prompt: got 'a\udcff', which is no UTF-8; allowed: a text"),
    (["generate", "--model", "x", "--stop", "\udce9"], r"stop: got '\udce9', which is no UTF-8"),
    (["train", "--prompt", "\udce9"], r"prompt: got '\udce9', which is no UTF-8"),
    (["train", "--prompt", ""], "prompt: got ''; allowed: a text that is not empty (or --sample 0)"),
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


def test_letters_that_a_terminal_does_not_have(monkeypatch):
    """A text that was generated so far is not lost for one of them."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "latin-1"))
    monkeypatch.setattr("nvfp4_kernels.cli.info.run", lambda arguments: print("naïve 🙂 text", flush=True))
    assert cli.main(["info"]) == 0
    assert raw.getvalue().decode("latin-1") == "naïve ? text\n"


def refused_without_torch(*argv):
    """The one line that a command refuses with, in a process that cannot import torch."""
    code = (
        "import sys; sys.modules['torch'] = None\nfrom nvfp4_kernels.cli import main; sys.exit(main.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture
def models(tmp_path):
    """Folders of models of which each lacks something, and texts."""
    config = preset("tiny").to_dict()
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    whole = len(header).to_bytes(8, "little") + header + bytes(16)
    for name, weights, changes in (
        ("whole", whole, {}), ("short", whole[:-1], {}), ("none", None, {}), ("wrong", whole, {"hidden_size": -1}),
        ("limit", whole, {"time_step_limit": 5}), ("limits", whole, {"time_step_limit": ["a", "b"]}),
        ("end", whole, {"eos_token_id": "x"}),
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | changes))
        (folder / "tokenizer.json").write_text("{}")
        if weights is not None:
            (folder / "model.safetensors").write_bytes(weights)
    (tmp_path / "held/checkpoints/step_00000001").mkdir(parents=True)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/run.json").write_text(Settings().to_json())
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/run.json").write_text('{"batch": "many"}')
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "list.json").write_text("[]")
    write_bad_data(tmp_path)
    return tmp_path


@pytest.mark.parametrize("argv, message", [
    ("generate --model no", "model: {}/no does not exist: it holds no run (run.json) and no checkpoint (config.json); do: "),
    ("generate --model begun", "model: {}/begun holds no checkpoint yet; do: "),
    ("generate --model damaged", "model: {}/damaged/run.json is damaged ("),
    ("generate --model short", "checkpoint: {}/short/model.safetensors is cut short or grown, "),
    ("generate --model none", "checkpoint: {}/none holds no *.safetensors; allowed: "),
    ("generate --model wrong", "{}/wrong/config.json: hidden_size: got -1; allowed: an integer >= 1"),
    ("generate --model limit", "{}/limit/config.json: time_step_limit: got 5; allowed: two numbers, 0 <= low <= high"),
    ("generate --model limits", "{}/limits/config.json: time_step_limit: got ['a', 'b']; allowed: two numbers"),
    ("generate --model end", "{}/end/config.json: eos_token_id: got 'x'; allowed: a token id, or a list of them"),
    ("generate --model whole --tokens 0", "tokens: got 0; allowed: at least 1"),
    ("generate --model whole --prompt=", "prompt: got ''; allowed: "),
    ("generate --model whole --stop=", "stop: got ''; allowed: "),
    ("generate --model whole --speculative 2", "speculative: got 2; allowed: 0, for {}/whole has no MTP block"),
    ("eval --model whole --text no.txt", "text: {}/no.txt does not exist; do: give a text file"),
    ("eval --model whole --text empty.txt", "text: got 0 tokens in {}/empty.txt; allowed: at least 2 (do: "),
    ("eval --model whole --text binary.txt", "text: {}/binary.txt is binary, not text; do: give a text file"),
    ("eval --model short --text text.txt", "model.safetensors is cut short or grown"),
    ("eval --model whole --text text.txt --length 0", "length: got 0; allowed: at least 1"),
    ("quantize --model whole --out text.txt/q --recipe nano-fp8", "out: {}/text.txt/q cannot be written, {}/text.txt is no"),
    ("quantize --model whole --out q --recipe nano-fp8 --calibrate no.txt", "calibrate: {}/no.txt does not exist; do: "),
    ("quantize --model whole --out q --bits 3 --calibrate text.txt", "bits: got 3.0; allowed: at least 4.5"),
    ("quantize --model whole --out q --bits 5", "calibrate: got no text for --bits; allowed: a text file"),
    ("quantize --model short --out q --recipe nano-fp8", "model.safetensors is cut short or grown"),
    ("train --data no", "data: {}/no does not exist; do: "),
    ("train --data empty.txt", "data: {}/empty.txt is empty; do: "),
    ("train --data binary.txt", "data: {}/binary.txt is binary, not text; do: "),
    ("train --data folder", "data: {}/folder holds no file; do: "),
    ("train --config no", "config: {}/no does not exist; do: "),
    ("train --config list.json", "config: {}/list.json: got a list; allowed: a JSON object"),
    ("train --config wrong", "config: {}/wrong: hidden_size: got -1; allowed: an integer >= 1"),
    ("train --from no", "from: {}/no does not exist"),
    ("train --from short", "model.safetensors is cut short or grown"),
    ("train --tokenizer no", "tokenizer: got {}/no, which is no file; allowed: bytes, or a tokenizer.json"),
    ("train --out text.txt", "out: {}/text.txt cannot be written, {}/text.txt is no folder; do: "),
    ("train --out held", "out: {}/held already holds a run; do: add --resume, or name another folder with --out"),
    ("train --lr inf", "lr: got inf; allowed: a finite number"),
    ("train --seed 9223372036854775808", "seed: got 9223372036854775808; allowed: 0 to 2^63 - 1"),
    ("train --sample -1", "sample: got -1; allowed: at least 0"),
    ("train --prompt=", "prompt: got ''; allowed: "),
    ("demo --data no", "data: {}/no does not exist; do: "),
    ("demo --out text.txt/x", "out: {}/text.txt/x cannot be written, {}/text.txt is no folder; do: "),
    ("plan --config no", "config: {}/no does not exist; do: "),
    ("tune --seconds nan", "seconds: got nan; allowed: 0 or more"),
    ("tune --save-default no", "save-default: {}/no: No such file or directory; allowed: "),
    ("tune --save-default text.txt", "save-default: {}/text.txt: no JSON; allowed: "),
])  # fmt: skip
def test_what_is_wrong_is_told_before_torch_is_imported(argv, message, models):
    paths = (
        "--model",
        "--text",
        "--out",
        "--calibrate",
        "--data",
        "--config",
        "--from",
        "--tokenizer",
        "--save-default",
    )
    words = argv.split()
    words = [models / word if before in paths else word for before, word in zip(["", *words], words, strict=False)]
    was = sorted(models.rglob("*"))
    assert message.replace("{}", str(models)) in refused_without_torch(*words)
    assert sorted(models.rglob("*")) == was


def test_what_cannot_be_written_is_told_before_the_work(capsys, models, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path not in (models / "text.txt", models))
    status, _, err = run(capsys, "eval", "--model", "x", "--text", "y", "--json", models / "text.txt")
    assert status == 2 and f"json: {models}/text.txt cannot be written, {models}/text.txt is not writable" in err
    status, _, err = run(capsys, "train", "--out", models / "run/a")
    assert status == 2 and f"out: {models}/run/a cannot be written, {models} is not writable; do: " in err


def test_the_recipes_of_quantize_are_those_of_ptq():
    assert tuple(formats.RECIPES) == quantize.RECIPES and min(formats.BITS.values()) == quantize.LEAST_BITS


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
