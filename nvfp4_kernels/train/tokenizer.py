"""Text to token ids and back: bytes as they are, or a tokenizer.json through the `tokenizers` package.

A tokenizer has `name`, `vocab_size`, `ids_below` (above every id; more than vocab_size where added tokens leave a gap before
them), `separator` (the id that ends a document, or None), `encode(bytes) -> ids`, `decode(ids) -> bytes` and `bytewise`
(whether each id stands for its bytes, whatever comes before). A separator is only ever predicted, never read: boundaries
travel as cu_seqlens.
"""

from pathlib import Path

import numpy as np

from nvfp4_kernels.checkpoint.tokenizer_json import open_tokenizer

# Names under which published tokenizers keep their end-of-document token; the first one present is used.
END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "[SEP]")


class ByteTokenizer:
    """Every byte is its own id; `separator` is the model's end-of-document id where that is no byte."""

    name = "bytes"
    vocab_size = ids_below = 256
    bytewise = True

    def __init__(self, separator: int | None = None):
        self.separator = separator

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8)

    def decode(self, ids) -> bytes:
        return bytes(int(i) for i in ids if 0 <= int(i) < 256)


class JsonTokenizer:
    """A tokenizer.json as transformers ships it."""

    bytewise = False

    def __init__(self, path: str | Path):
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"tokenizer: got {path}, which is no file; allowed: bytes, or a tokenizer.json")
        self.inner = open_tokenizer(path, "tokenizer")
        self.name = str(path.resolve())
        self.vocab_size = self.inner.get_vocab_size(with_added_tokens=True)
        self.ids_below = max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        found = (self.inner.token_to_id(token) for token in END_TOKENS)
        self.separator = next((i for i in found if i is not None), None)

    def encode(self, text: bytes) -> np.ndarray:
        dtype = np.uint16 if self.ids_below <= 1 << 16 else np.uint32
        # A damaged byte becomes U+FFFD rather than an error: one bad file must not end a run over a whole folder.
        return np.asarray(self.inner.encode(text.decode("utf-8", "replace"), add_special_tokens=False).ids, dtype)

    def decode(self, ids) -> bytes:
        return self.inner.decode([int(i) for i in ids]).encode()


def load_tokenizer(name: str, model_vocab: int, model_eos: int | list[int] | None = None):
    """`bytes`, or the path of a tokenizer.json; refuses one that has ids beyond the model's vocabulary."""
    special = isinstance(model_eos, int) and 256 <= model_eos < model_vocab
    tokenizer = ByteTokenizer(model_eos if special else None) if name == "bytes" else JsonTokenizer(name)
    if tokenizer.ids_below > model_vocab:
        raise ValueError(
            f"tokenizer: got ids below {tokenizer.ids_below} in {name}; allowed: at most the model's vocab_size"
            f" {model_vocab} (choose a smaller tokenizer, or a config with a larger vocab_size)"
        )
    return tokenizer
