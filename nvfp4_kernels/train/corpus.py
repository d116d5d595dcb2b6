"""A corpus: one flat array of token ids and where its documents begin, from files, folders or ready ids.

Sources: a text file, a folder of text files (each a document), a .npy or .bin of ids, or nothing: then the Python
standard library's own sources on this machine, so that a first run needs no download.
"""

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Tests are left out of the default corpus because not every distribution of Python ships them.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
IDS = (".npy", ".bin")
ID_DTYPES = {"uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32}
CHUNK = 1 << 24  # tokens looked at together, so that a memory-mapped corpus never has to fit in memory


@dataclass(frozen=True)
class Corpus:
    """ids: 1-D uint8/16/32, in memory or memory-mapped; starts: int64 [documents + 1]; text_bytes: bytes of the text
    these ids stand for (None where only ids are known); end_label: what a document's last token should predict (None:
    nothing); skipped: files of a folder left out because they hold no text."""

    ids: np.ndarray
    starts: np.ndarray
    source: str
    text_bytes: int | None = None
    end_label: int | None = None
    skipped: int = 0

    @property
    def documents(self) -> int:
        return len(self.starts) - 1

    @property
    def unit(self) -> str:
        """Of a loss times tokens_per_byte."""
        return "nats a byte" if self.text_bytes else "nats a token"

    @property
    def fingerprint(self) -> str:
        """Tells one corpus from another at a resume: sizes, and a CRC-32 of the first and last 16 million ids."""
        crc = zlib.crc32(np.ascontiguousarray(self.ids[-CHUNK:]), zlib.crc32(np.ascontiguousarray(self.ids[:CHUNK])))
        return f"{len(self.ids)} tokens, {self.documents} documents, crc32 {zlib.crc32(self.starts, crc):08x}"

    @property
    def tokens_per_byte(self) -> float:
        """Turns a loss in nats a token into nats a byte; 1.0 where the text is not known."""
        return len(self.ids) / self.text_bytes if self.text_bytes else 1.0


def load_corpus(path: str | Path | None, tokenizer, vocab_size: int, bin_dtype: str = "uint16") -> Corpus:
    """The corpus at `path`; None means the standard library. Raises ValueError saying what to do instead."""
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [f for f in sorted_files(root, ".py") if not SKIPPED_FOLDERS.intersection(f.relative_to(root).parts)]
        return read_text(files, tokenizer, f"Python's standard library, {len(files)} files", folder=True)
    path = Path(path)
    files = find_files(path)
    if path.is_dir():
        return read_text(files, tokenizer, str(path), folder=True)
    if path.suffix in IDS:
        return read_ids(path, vocab_size, bin_dtype, tokenizer.separator)
    return read_text(files, tokenizer, str(path), folder=False)


def find_files(path: Path) -> list[Path]:
    """What there is to read at `path`. Raises ValueError where that is nothing, or a file that is neither text nor ids."""
    if path.is_dir():
        files = sorted_files(path)
        if not files:
            raise ValueError(f"data: {path} holds no file; do: give a folder with text files in it")
        return files
    if not path.is_file():
        raise ValueError(f"data: {path} does not exist; do: give a text file, a folder of text, or ids as .npy or .bin")
    if path.stat().st_size == 0:
        raise ValueError(f"data: {path} is empty; do: give a file that holds text or token ids")
    if path.suffix not in IDS:
        with open(path, "rb") as file:
            if looks_binary(file.read(1 << 16)):
                raise ValueError(f"data: {path} is binary, not text; do: give text, or ids as .npy or .bin")
    return [path]


def sorted_files(root: Path, suffix: str = "") -> list[Path]:
    """Every visible file below `root` by relative path, so that two machines with the same files agree on the order."""
    found = (f for f in root.rglob(f"*{suffix}") if f.is_file())
    visible = (f for f in found if not any(part.startswith(".") for part in f.relative_to(root).parts))
    return sorted(visible, key=lambda f: f.relative_to(root).as_posix())


def looks_binary(head: bytes) -> bool:
    """A NUL, or more than one in ten control characters: what git and file(1) go by, too."""
    control = sum(byte < 32 and byte not in b"\t\n\r\f\b\x1b" for byte in head)
    return b"\0" in head or control * 10 > len(head)


def read_text(files: list[Path], tokenizer, source: str, folder: bool) -> Corpus:
    parts, lengths, text_bytes, skipped = [], [], 0, 0
    for file in files:
        try:
            text = file.read_bytes()
        except OSError as error:
            raise ValueError(f"data: {file} cannot be read ({error.strerror}); do: check its permissions") from error
        if folder and looks_binary(text[: 1 << 16]):
            skipped += 1
            continue
        ids = tokenizer.encode(text)
        if len(ids) == 0:
            continue
        parts.append(ids)
        lengths.append(len(ids))
        text_bytes += len(text)
    if not parts:
        what = f"only binary files ({skipped})" if skipped else "no text at all"
        raise ValueError(f"data: {source} holds {what}; do: give a folder or file with text in it")
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Corpus(np.concatenate(parts), starts, source, text_bytes, tokenizer.separator, skipped)


def read_ids(path: Path, vocab_size: int, bin_dtype: str, separator: int | None) -> Corpus:
    """Token ids as they are, memory-mapped; documents end after each `separator` id where the tokenizer has one."""
    if path.suffix == ".npy":
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"data: {path} is no .npy of numbers; do: write it with numpy.save(path, ids)") from error
        if ids.ndim != 1 or ids.dtype.name not in ID_DTYPES:
            raise ValueError(
                f"data: got {ids.dtype} {list(ids.shape)} in {path}; allowed: one axis of uint8, uint16"
                " or uint32 (do: numpy.save(path, ids.reshape(-1).astype('uint16')))"
            )
    else:
        dtype = np.dtype(ID_DTYPES[bin_dtype])
        if path.stat().st_size % dtype.itemsize:
            raise ValueError(
                f"data: {path} has {path.stat().st_size} bytes, no whole number of {bin_dtype};"
                " do: name its dtype with --bin-dtype uint8, uint16 or uint32"
            )
        ids = np.memmap(path, dtype.newbyteorder("<"), "r")
    if len(ids) == 0:
        raise ValueError(f"data: {path} holds no ids; do: give a file with token ids in it")
    ends = []
    for begin in range(0, len(ids), CHUNK):
        chunk = ids[begin : begin + CHUNK]
        if int(chunk.max()) >= vocab_size:
            at = begin + int(np.argmax(chunk >= vocab_size))
            raise ValueError(
                f"data: got id {int(ids[at])} at position {at} of {path}; allowed: 0 to {vocab_size - 1},"
                " the model's vocabulary (do: check --bin-dtype, or choose a larger vocab_size)"
            )
        if begin == 0 and path.suffix == ".bin" and ids.dtype == np.uint16 and _of_uint32(chunk, vocab_size):
            raise ValueError(
                f"data: got {chunk[:6].tolist()}, ... in {path}, every second one small, as uint32 read as uint16 looks;"
                " do: name its dtype with --bin-dtype uint32"
            )
        if separator is not None:
            ends.append(begin + 1 + np.flatnonzero(chunk == separator))
    starts = np.unique(np.concatenate([[0], *ends, [len(ids)]])).astype(np.int64)
    return Corpus(ids, starts, str(path))


def _of_uint32(words: np.ndarray, vocab_size: int) -> bool:
    """Whether 16-bit words look like the halves of 32-bit ids, of which the upper ones are no larger than that of
    vocab_size - 1. As ids of their own they may all be below vocab_size."""
    largest = (vocab_size - 1) >> 16
    return len(words) >= 64 and int(words[1::2].max()) <= largest < int(words[::2].max())


def entropies(corpus: Corpus) -> dict[str, float]:
    """Entropy of a byte given none, one and two bytes before it, in nats a byte: what a table of counts could reach.

    Plug-in estimates over the whole corpus, documents run together. For ids beyond bytes only the unigram is told, per
    byte of text: the counts of longer runs over a large vocabulary say more of the corpus's size than of its order.
    """
    unigram = np.zeros(1, np.int64)
    bytes_only = corpus.ids.dtype.itemsize == 1 or int(corpus.ids.max()) < 256
    counts = [unigram, np.zeros(1 << 16, np.int64), np.zeros(1 << 24, np.int64)] if bytes_only else [unigram]
    for begin in range(0, len(corpus.ids), CHUNK):
        ids = np.asarray(corpus.ids[begin : begin + CHUNK + 2]).astype(np.int32)  # 2 more: runs across the chunk's end
        keys = ids
        for order in range(len(counts)):
            if order:
                keys = keys[:-1] * 256 + ids[order:]
            add = np.bincount(keys[:CHUNK], minlength=len(counts[order]))
            counts[order] = add + np.pad(counts[order], (0, len(add) - len(counts[order])))
    joint = [0.0] + [entropy_of(count) for count in counts]
    names = ("unigram", "bigram", "trigram")[: len(counts)]
    return {name: (joint[i + 1] - joint[i]) * corpus.tokens_per_byte for i, name in enumerate(names)}


def entropy_of(counts: np.ndarray) -> float:
    counts = counts[counts > 0].astype(np.float64)
    total = counts.sum()
    return float(np.log(total) - (counts * np.log(counts)).sum() / total) if len(counts) else 0.0
