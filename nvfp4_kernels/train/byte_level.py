"""The byte tokenizer as a tokenizer.json, so that a model trained on bytes can be stored as others are and read by others."""

import json

from nvfp4_kernels.train.tokenizer import END_TOKENS, ByteTokenizer


def tokenizer_json(tokenizer: ByteTokenizer) -> str:
    """A byte-level BPE of 256 bytes and no merges: each byte is its own id, the separator a special token of its own."""
    ends = {} if tokenizer.separator is None else {END_TOKENS[0]: tokenizer.separator}
    special = [_special(number, text) for text, number in ends.items()]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return json.dumps(
        {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
            "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "merges": [],
                # The special token as well: one that is not in here would be given the next free number.
                "vocab": _letters() | ends,
            },
        },
        indent=1,
    )  # fmt: skip


def _letters() -> dict[str, int]:
    """The printable letter by which byte-level tokenizers (GPT-2's first) write each byte: its own where it has one."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _special(number: int, text: str) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, **flags, "special": True}
