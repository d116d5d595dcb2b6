"""Sources of text and ids, the errors of bad ones, and entropies against a brute-force count."""

import collections
import math

import numpy as np
import pytest

from nvfp4_kernels.train.corpus import CHUNK, Corpus, entropies, load_corpus
from nvfp4_kernels.train.tokenizer import ByteTokenizer, load_tokenizer

BYTES = ByteTokenizer(258)


def load(path, **more):
    return load_corpus(path, BYTES, 260, **more)


def test_folder_sorted_by_relative_path(tmp_path):
    (tmp_path / "b").mkdir()
    for name, text in {"z.txt": b"last", "b/a.txt": b"first", ".hidden": b"no", "empty": b"", "raw": b"\0\1\2"}.items():
        (tmp_path / name).write_bytes(text)
    got = load(tmp_path)
    assert bytes(got.ids) == b"firstlast" and got.starts.tolist() == [0, 5, 9]
    assert got.skipped == 1 and got.text_bytes == 9 and got.end_label == 258 and got.ids.dtype == np.uint8


def test_standard_library_is_deterministic_and_without_tests():
    one, two = load(None), load(None)
    assert np.array_equal(one.ids, two.ids) and np.array_equal(one.starts, two.starts)
    assert one.documents > 100 and b"import" in bytes(one.ids[:1_000_000])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_ids_from_npy_and_bin(tmp_path, dtype):
    ids = np.array([1, 2, 258 % 256 if dtype == "uint8" else 258, 3, 4], dtype)
    np.save(tmp_path / "ids.npy", ids)
    ids.tofile(tmp_path / "ids.bin")
    for got in (load(tmp_path / "ids.npy"), load(tmp_path / "ids.bin", bin_dtype=dtype)):
        assert np.array_equal(got.ids, ids) and isinstance(got.ids, np.memmap) and got.text_bytes is None
        assert got.starts.tolist() == ([0, 5] if dtype == "uint8" else [0, 3, 5])


@pytest.mark.parametrize("name, content, message", [
    ("missing.txt", None, "does not exist"),
    ("empty.txt", b"", "is empty"),
    ("program", b"\x7fELF\0\0\0\2", "is binary"),
    ("noise", bytes(range(1, 9)) * 50, "is binary"),
    ("odd.bin", b"123", "--bin-dtype"),
    ("bad.npy", b"not numpy at all", "numpy.save"),
])  # fmt: skip
def test_bad_file_is_one_line_that_says_what_to_do(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value) and "do: " in str(caught.value) and str(caught.value).startswith("data: ")


@pytest.mark.parametrize("ids, message", [
    (np.zeros(4, np.float32), "allowed: one axis of uint8"),
    (np.zeros((2, 2), np.uint16), "allowed: one axis of uint8"),
    (np.zeros(0, np.uint16), "holds no ids"),
    (np.array([5, 260, 7], np.uint16), "got id 260 at position 1"),
    (np.array([{}], object), "numpy.save"),
])  # fmt: skip
def test_bad_ids(tmp_path, ids, message):
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "ids.npy")
    assert "\n" not in str(caught.value)


def test_folders_without_text(tmp_path):
    with pytest.raises(ValueError, match="holds no file"):
        load(tmp_path)
    (tmp_path / "a").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"only binary files \(1\)"):
        load(tmp_path)


def brute_force_entropy(data: bytes, order: int) -> float:
    def joint(n):
        counts = collections.Counter(data[i : i + n] for i in range(len(data) - n + 1))
        total = sum(counts.values())
        return -sum(c / total * math.log(c / total) for c in counts.values())

    return joint(order) - (joint(order - 1) if order > 1 else 0.0)


def test_entropies_against_counting(monkeypatch):
    data = np.random.default_rng(0).choice(list(b"abcd \n"), 5000, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.1]).astype(np.uint8)
    data[1:] = np.where(data[:-1] == ord("a"), ord("b"), data[1:])
    corpus = Corpus(data, np.array([0, len(data)]), "", len(data))
    want = {name: brute_force_entropy(data.tobytes(), n + 1) for n, name in enumerate(("unigram", "bigram", "trigram"))}
    assert entropies(corpus) == pytest.approx(want, abs=1e-12)
    monkeypatch.setattr("nvfp4_kernels.train.corpus.CHUNK", 701)  # runs across the chunks' ends are counted once
    assert entropies(corpus) == pytest.approx(want, abs=1e-12)
    assert CHUNK > 701


def test_entropy_of_larger_ids_is_per_byte():
    ids = np.tile(np.array([1000, 2000], np.uint16), 50)
    assert entropies(Corpus(ids, np.array([0, 100]), "", 400)) == pytest.approx({"unigram": math.log(2) / 4})


@pytest.mark.parametrize("vocab", [260, 1 << 17])
def test_uint32_read_as_uint16_is_told(tmp_path, vocab):
    ids = np.random.default_rng(0).integers(0, vocab, 100)
    for dtype in ("uint32", "uint16"):
        (ids % (1 << 16) if dtype == "uint16" else ids).astype(dtype).tofile(tmp_path / f"{dtype}.bin")
    with pytest.raises(ValueError, match="do: name its dtype with --bin-dtype uint32"):
        load_corpus(tmp_path / "uint32.bin", BYTES, vocab)
    assert np.array_equal(load_corpus(tmp_path / "uint32.bin", BYTES, vocab, "uint32").ids, ids)
    assert len(load_corpus(tmp_path / "uint16.bin", BYTES, vocab).ids) == 100
    np.zeros(100, np.uint16).tofile(tmp_path / "zeros.bin")
    assert len(load_corpus(tmp_path / "zeros.bin", BYTES, vocab).ids) == 100


def test_ids_beyond_how_many_there_are(tmp_path):
    """Added tokens may leave a gap: the largest id decides whether uint16 holds it and whether the model has it."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "a": 1, "<late>": 70_000}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    path = tmp_path / "tokenizer.json"
    inner.save(str(path))
    got = load_tokenizer(str(path), 70_001)
    assert got.vocab_size == 3 and got.ids_below == 70_001 and got.encode(b"a <late>").tolist() == [1, 70_000]
    with pytest.raises(ValueError, match="at most the model's vocab_size 70000"):
        load_tokenizer(str(path), 70_000)


def test_json_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "a": 1, "b": 2, "</s>": 3}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    inner.save(str(path))
    got = load_tokenizer(str(path), 100)
    assert got.encode(b"a b a").tolist() == [1, 2, 1] and got.separator == 3 and got.vocab_size == 4
    text = tmp_path / "t.txt"
    text.write_bytes(b"a b a")
    corpus = load_corpus(text, got, 100)
    assert corpus.tokens_per_byte == 3 / 5 and corpus.end_label == 3
    with pytest.raises(ValueError, match="at most the model's vocab_size 2"):
        load_tokenizer(str(path), 2)
    path.write_text("{")
    with pytest.raises(ValueError, match="is no tokenizer.json"):
        load_tokenizer(str(path), 100)
    with pytest.raises(ValueError, match="which is no file"):
        load_tokenizer(str(tmp_path / "nothing"), 100)


def test_byte_tokenizer_round_trip_and_separator():
    assert load_tokenizer("bytes", 260, 258).separator == 258
    assert load_tokenizer("bytes", 260, 2).separator is None
    text = "naïve\n".encode()
    assert BYTES.decode(BYTES.encode(text).tolist() + [258]) == text
