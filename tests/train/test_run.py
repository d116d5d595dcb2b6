"""Whole runs of a very small hybrid model: kill -9, Ctrl-C and resume bit for bit; skipped steps; folders; plots."""

import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nvfp4_kernels.checkpoint import snapshot
from nvfp4_kernels.model.config import HybridConfig
from nvfp4_kernels.recipe import bf16, nvfp4
from nvfp4_kernels.train import loop, progress
from nvfp4_kernels.train import run as runs
from nvfp4_kernels.train.compare import compare
from nvfp4_kernels.train.progress import Metrics, read_metrics
from nvfp4_kernels.train.settings import Settings
from nvfp4_kernels.train.setup import load_run

pytest.importorskip("matplotlib")

CONFIG = HybridConfig(
    "MEM*E", vocab_size=260, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16, n_groups=1, chunk_size=16, n_routed_experts=4,
    num_experts_per_tok=2, moe_intermediate_size=32, moe_shared_expert_intermediate_size=32, moe_latent_size=16,
    num_nextn_predict_layers=1, eos_token_id=258, pad_token_id=256, bos_token_id=257,
)  # fmt: skip


@pytest.fixture
def settings(tmp_path, text) -> Settings:
    CONFIG.save(tmp_path)
    return Settings(
        config=str(tmp_path / "config.json"), data=str(text), batch=2, length=48, steps=24, lr=5e-3, warmup=4, decay=0.3,
        save_every=5, health_every=7, validation=0.1, validation_tokens=96, validation_every=10, out=str(tmp_path / "run"),
        threads=1,
    )  # fmt: skip


def losses(run: Path) -> list[tuple]:
    return [
        (r["step"], r["loss"], r["gradient_norm"]) if "loss" in r else (r["step"], r["validation_loss"])
        for r in read_metrics(Path(run) / "metrics.jsonl")
    ]


def start(settings: Settings) -> subprocess.Popen:
    """The run in a process of its own, as the command line does it."""
    code = (
        "import json, sys; from nvfp4_kernels.train.run import train; from nvfp4_kernels.train.settings import Settings;"
        "sys.exit(130 if train(Settings(**json.loads(sys.argv[1]))).stopped else 0)"
    )
    path = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-c", code, settings.to_json()], env=os.environ | path, stderr=subprocess.PIPE, text=True
    )


def wait_for_lines(process: subprocess.Popen, settings: Settings, lines: int) -> None:
    metrics = Path(settings.out) / "metrics.jsonl"
    end = time.monotonic() + 600  # on a machine that others use too
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        time.sleep(0.002)


@pytest.mark.parametrize("changes", [
    {"recipe": "nvfp4", "accumulate": 2, "checkpoint_activations": True}, {"recipe": "bf16"},
], ids=["nvfp4-accumulate-checkpoint", "bf16"])  # fmt: skip
def test_killed_run_resumes_bit_for_bit(settings, tmp_path, changes):
    settings = settings.replace(steps=26, **changes)
    whole = settings.replace(out=str(tmp_path / "whole"))
    runs.train(whole, quiet=True)
    process = start(settings)
    wait_for_lines(process, settings, 13)
    process.kill()
    with process.stderr:
        assert process.wait() == -signal.SIGKILL
    found, damaged = snapshot.newest(Path(settings.out) / "checkpoints")
    assert found.step in range(10, 26) and damaged == []
    result = runs.train(settings, resume=True, quiet=True)
    assert result.steps == 26 and losses(settings.out) == losses(whole.out) and len(losses(whole.out)) == 29
    expected = snapshot.newest(tmp_path / "whole/checkpoints")[0].tensors("model")
    assert all(t.equal(expected[n]) for n, t in result.model.state_dict().items())


def test_ctrl_c_saves_where_it_stands(settings, tmp_path):
    settings = settings.replace(steps=26)
    whole = settings.replace(out=str(tmp_path / "whole"))
    runs.train(whole, quiet=True)
    process = start(settings)
    wait_for_lines(process, settings, 12)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=300)
    assert process.returncode == 130 and "saved; do: nvfp4 train --out" in text and "Traceback" not in text
    steps = max(step for step, *_ in losses(settings.out))
    assert snapshot.newest(Path(settings.out) / "checkpoints")[0].step == steps < 26  # not one step lost
    runs.train(settings, resume=True, quiet=True)
    assert losses(settings.out) == losses(whole.out)


def test_second_interrupt_stops_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        with runs.Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert interrupts.asked
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupts_of_one_moment_are_one():
    """torchrun hands on what the terminal sends to all."""
    with runs.Interrupts(0.5) as interrupts:
        for name in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), name)
            time.sleep(0.01)
        assert interrupts.asked
        time.sleep(0.5)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_damaged_snapshot_falls_back_to_the_one_before(settings, tmp_path, capsys):
    whole = settings.replace(out=str(tmp_path / "whole"))
    runs.train(whole, quiet=True)
    runs.train(settings, quiet=True)
    newest = Path(settings.out) / "checkpoints/step_00000024/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    runs.train(settings, resume=True)
    text = capsys.readouterr().err
    assert "warning: checkpoint: " in text and "is cut short" in text and "resumed at step 20 of 24" in text
    assert losses(settings.out) == losses(whole.out)


def test_full_disk_in_mid_run(settings, monkeypatch):
    import errno

    real, calls = os.fsync, iter(range(1000))

    def full(handle):
        if next(calls) > 22:  # two text files and the first snapshot go through
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(snapshot.SnapshotError, match="is full") as caught:
        runs.train(settings, quiet=True)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    folder = Path(settings.out) / "checkpoints"
    assert [p for p in folder.iterdir() if p.name.startswith(".")] == []
    assert snapshot.newest(folder)[0].step >= 5
    assert runs.train(settings, resume=True, quiet=True).steps == 24


def test_full_disk_at_the_start_leaves_nothing(settings, monkeypatch):
    import errno

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(snapshot.SnapshotError, match="is full; do: free some space"):
        runs.train(settings, quiet=True)
    assert not Path(settings.out).exists()


def test_ids_without_text_are_measured_in_tokens(settings, tmp_path):
    np.save(tmp_path / "ids.npy", (np.arange(4000) % 97).astype(np.uint16))
    result = runs.train(settings.replace(data=str(tmp_path / "ids.npy"), steps=2), quiet=True)
    assert result.unit == "nats a token" and result.validation_loss > 0


def test_bad_step_is_logged_and_the_run_goes_on(settings, monkeypatch, capsys):
    real = runs.build_model

    def poisoned(*args):
        model = real(*args)
        state = {"forwards": 0}

        def hook(module, inputs, y):
            state["forwards"] += 1
            return y * float("nan") if 3 <= state["forwards"] <= 4 else y  # the third step, and its repetition

        model.backbone.layers[2].mixer.in_proj.register_forward_hook(hook)
        return model

    monkeypatch.setattr(runs, "build_model", poisoned)
    result = runs.train(settings.replace(validation=0.0, health_every=0))
    text = capsys.readouterr().err
    assert result.skipped == 1 and result.steps == 24
    assert "step 3 skipped: its gradient is not finite, first in backbone.layers.2.mixer.in_proj, y (1 skipped" in text
    row = next(r for r in read_metrics(Path(settings.out) / "metrics.jsonl") if r["step"] == 3)
    assert row["skipped"] and row["loss"] is None and row["origin"] == "backbone.layers.2.mixer.in_proj, y"
    json.loads((Path(settings.out) / "metrics.jsonl").read_text().splitlines()[2], parse_constant=pytest.fail)


def test_a_resumed_run_keeps_its_model_whatever_becomes_of_the_config(settings):
    few = settings.replace(validation=0.0, health_every=0)
    runs.train(few.replace(steps=2), quiet=True)
    CONFIG.replace(routed_scaling_factor=7.0).save(settings.config)
    assert runs.train(few.replace(steps=3), resume=True, quiet=True).model.config == CONFIG
    Path(settings.config).unlink()
    assert runs.train(few.replace(steps=4), resume=True, quiet=True).steps == 4


def test_other_data_at_a_resume_is_refused(settings):
    runs.train(settings.replace(steps=5), quiet=True)
    (Path(settings.data) / "0.txt").write_text("document 0: " + "the quick brown fox jumps over the lazy cat. " * 5)
    with pytest.raises(
        ValueError, match=r"data: got \d+ tokens, 20 documents, crc32 .*; allowed: .* what the run began"
    ):
        runs.train(settings, resume=True, quiet=True)


def test_folder_rules(settings, tmp_path):
    with pytest.raises(ValueError, match="holds no run to resume"):
        runs.train(settings, resume=True, quiet=True)
    assert not Path(settings.out).exists()
    runs.train(settings.replace(steps=2), quiet=True)
    with pytest.raises(ValueError, match="already holds a run; do: add --resume"):
        runs.train(settings, quiet=True)
    (tmp_path / "blocked").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        runs.train(settings.replace(out=str(tmp_path / "blocked/run")), quiet=True)


def test_a_run_leaves_what_it_promises(settings):
    result = runs.train(settings, quiet=True)
    out = Path(settings.out)
    assert {p.name for p in out.iterdir()} == {
        "config.json", "run.json", "metrics.jsonl", "checkpoints", "loss.png", "health.png"}  # fmt: skip
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in ("loss.png", "health.png"))
    assert len(list((out / "checkpoints").iterdir())) == 2
    rows = read_metrics(out / "metrics.jsonl")
    assert [r["step"] for r in rows if "health" in r] == [1, 8, 15, 22]
    health = rows[0]["health"]
    assert (
        5 < health["worst_db"] < 40
        and "layers" in health["worst_layer"]
        and health["worst_operand"] in ("x", "w", "dy")
    )
    assert rows[0]["expert_load"]["max_violation"] >= 0
    steps = [r for r in rows if "loss" in r]
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"] and result.validation_loss < steps[0]["loss"]
    model, tokenizer, step = load_run(out)
    assert step == 24 and tokenizer.separator == 258
    assert all(a.equal(b) for a, b in zip(model.parameters(), result.model.parameters(), strict=True))


def test_minutes_end_with_a_decay_and_resume(settings, monkeypatch):
    clock = itertools.count(0.0, 0.05)  # begin and end of each step: 24 of them in 0.02 minutes
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    settings = settings.replace(steps=None, minutes=0.02, validation=0.0)
    result = runs.train(settings, quiet=True)
    state = snapshot.newest(Path(settings.out) / "checkpoints")[0].state
    assert state["steps"] == result.steps == 24
    rates = [r["lr"] for r in read_metrics(Path(settings.out) / "metrics.jsonl")]
    assert rates[-1] == pytest.approx(settings.lr * 0.01) and max(rates) == settings.lr
    assert runs.train(settings, resume=True, quiet=True).steps == result.steps


def test_a_clocks_decay_is_gone_on_with_after_a_resume(settings):
    settings = settings.replace(steps=None, minutes=1.0, validation=0.0)
    with runs.Run(settings, quiet=True) as run:
        for _ in range(6):
            run.advance()
        run.fix_steps(16)  # as the clock does: the ten steps left are the decay
        for _ in range(4):
            run.advance()
        before = run.trainer.schedule
        run.finish()
    assert before.decay == 10
    with runs.Run(settings, resume=True, quiet=True) as run:
        assert run.trainer.step == 10 and run.trainer.schedule == before
    with runs.Run(settings.replace(minutes=2.0), resume=True, quiet=True) as run:
        assert run.steps is None  # another clock decides anew


def test_compare_trains_on_the_same_batches(settings, tmp_path):
    got = compare(settings.replace(steps=4, out=str(tmp_path / "both")), {"bf16": bf16, "nvfp4": nvfp4}, quiet=True)
    one, two = (read_metrics(tmp_path / "both" / name / "metrics.jsonl")[0] for name in ("bf16", "nvfp4"))
    assert one["loss"] != two["loss"] and one["loss"] == pytest.approx(two["loss"], rel=0.02)
    assert set(got.entropies) == {"unigram", "bigram", "trigram"} and (tmp_path / "both/loss.png").exists()
    table = got.table()
    assert "nvfp4" in table and "tokens/s" in table and f"{got.gap('nvfp4'):+.2%}" in table
    compare(settings.replace(steps=2, out=str(tmp_path / "both")), {"bf16": bf16}, quiet=True)  # replaced, not refused
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/bf16").mkdir()
    (tmp_path / "mine/bf16/thesis.txt").write_text("keep me")
    with pytest.raises(ValueError, match="holds files that are no run"):
        compare(settings.replace(steps=2, out=str(tmp_path / "mine")), {"bf16": bf16}, quiet=True)
    with pytest.raises(ValueError, match="validation: got 0"):
        compare(settings.replace(validation=0.0), {"bf16": bf16})


def test_metrics_are_cut_to_the_resumed_step_and_torn_lines_ignored(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write(step=1)
    position = metrics.position()
    metrics.write(step=2)
    metrics.close()
    with open(path, "ab") as file:
        file.write(b'{"step": 3')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    resumed = Metrics(path, position)
    resumed.write(step=2, again=True)
    resumed.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "again": True}]


def test_memory_is_told_where_the_system_tells(monkeypatch):
    cpu = torch.device("cpu")
    assert progress.memory_bytes(cpu) > 1 << 20
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert runpy.run_path(progress.__file__)["memory_bytes"](cpu) == 0
