"""The order of events around a second stream, on streams that write down what they are told."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch

from nvfp4_kernels.nn import aside as module


class Recorder:
    """Streams and tensors by name, and what happened to them in order."""

    def __init__(self):
        self.events, self.current = [], "main"

    def stream(self, name):
        wait = lambda other: self.events.append(f"{name} waits for {other.name}")  # noqa: E731
        return SimpleNamespace(name=name, wait_stream=wait)

    def tensor(self, name):
        record = lambda stream: self.events.append(f"{name} is {stream.name}'s too")  # noqa: E731
        return SimpleNamespace(name=name, device=SimpleNamespace(type="cuda"), record_stream=record)

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def run(self, x):
        self.events.append(f"{x.name} on {self.current}")
        return self.tensor("y")


def test_the_second_stream_waits_and_is_waited_for(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: recorder.stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", recorder.on)
    monkeypatch.setattr(module, "_second", lambda device: recorder.stream("side"))
    joined = module.aside(recorder.run, recorder.tensor("x"))
    recorder.events.append("meanwhile")
    assert joined().name == "y"
    assert recorder.events == [
        "side waits for main", "x on side", "x is side's too", "meanwhile", "main waits for side", "y is main's too",
    ]  # fmt: skip


def test_without_a_second_stream_it_runs_when_asked_for():
    calls = []
    joined = module.aside(lambda x: calls.append(x) or x + 1, torch.ones(2))
    assert not calls
    assert joined().tolist() == [2, 2] and len(calls) == 1
