"""benchmarks/plot.py: curves with the limit drawn in where a series has sizes, bars where it has not."""

import json

import pytest

figure = pytest.importorskip("matplotlib.figure")

from benchmarks import plot  # noqa: E402


def row(backend, size, rate, **more):
    place = {} if size is None else {"series": "rows of 64", "size": size, "axis": "rows"}
    base = {"op": "o", "case": f"case {size}", "backend": backend, "dtype": "bf16", "seconds": 1 / rate}
    return base | {"yardstick": backend == "torch", "bytes_per_second": rate} | place | more


ROWS = [
    row("native", 4, 3e9, share_of_limit=0.5), row("native", 1, 1e9, share_of_limit=0.25), row("native", 16, 8e9),
    row("torch", 1, 0.5e9), row("torch", 4, 0.6e9, share_of_limit=0.1), row("torch", 16, 0.7e9, share_of_limit=0.07),
    row("torch", 16, 0.2e9),
    row("native", None, 5e9, share_of_limit=0.5, times_yardstick=2.5), row("torch", None, 2e9, case="case None"),
    row("native", 1, 7e9, series="one size alone", case="alone"),
]  # fmt: skip


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The figure of a report of these rows."""
    kept = []

    def draw(rows):
        header = {"device": "chip", "torch": "2", "date": "d", "commit": "c"}
        source = tmp_path / "chip.json"
        source.write_text(json.dumps(header | {"rows": rows}))
        monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: kept.append(self))
        assert plot.draw(source) == tmp_path / "chip.png"
        return [axis for axis in kept[-1].axes if axis.has_data()]

    return draw


def test_curves_and_bars(drawn):
    curve, bars = drawn(ROWS)
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in curve.lines}
    assert lines == {
        "native bf16": ([1, 4, 16], [1, 3, 8]),
        "torch bf16": ([1, 4, 16], [0.5, 0.6, 0.7]),  # of two peers of a name, the faster
        "limit": ([1, 4, 16], [4, 6, 10]),
    }
    assert (curve.get_title("left"), curve.get_xlabel(), curve.get_ylabel()) == ("o: rows of 64", "rows", "GB/s")
    assert curve.get_xscale() == "log" and [t.get_text() for t in curve.get_xticklabels()] == ["1", "4", "16"]
    assert {text.get_text() for text in curve.get_legend().get_texts()} == set(lines)
    assert [bar.get_width() for bar in bars.patches] == [5, 2, 7]
    assert [text.get_text() for text in bars.texts] == [" 5 · 2.50x", " 2", " 7"]
    (limits,) = bars.lines
    assert list(limits.get_xdata())[0] == 10


@pytest.mark.parametrize("rows", [ROWS[:7], ROWS[7:]], ids=["curves alone", "bars alone"])
def test_one_kind_alone(drawn, rows):
    assert len(drawn(rows)) == 1


def test_short_numbers():
    assert [plot.short(n) for n in (1, 17, 1024, 1536, 1 << 26)] == ["1", "17", "1K", "1.5K", "64M"]
