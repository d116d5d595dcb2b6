"""Tokens to text while they come: no piece ends within a character, and none holds what may yet become a stop string."""

import codecs
from collections.abc import Sequence

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes, and so tokens at most, of one character in UTF-8


class Detokenizer:
    """Decodes a growing list of ids piece by piece.

    tokenizer: has decode(ids) -> bytes and bytewise. Where each id stands for its bytes whatever comes before, the pieces are
    those bytes. Otherwise the newest tokens are decoded together with those of the piece before, since a decoder may treat
    the first token otherwise (a leading space), and held back while they end in U+FFFD: an unfinished character.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.bytewise else None
        self._ids: list[int] = []
        self._before = self._given = 0  # ids[before:given] are the last piece, ids[given:] are held back

    def push(self, ids: Sequence[int]) -> str:
        """The further text that is certain."""
        if self._bytes:
            return self._bytes.decode(self.tokenizer.decode(ids))
        self._ids += ids
        text = self._fresh()
        unfinished = text.endswith(_REPLACEMENT) and len(self._ids) - self._given < _LONGEST_CHARACTER
        return "" if unfinished or not text else self._give(text)

    def finish(self) -> str:
        """What was held back: an unfinished character becomes U+FFFD."""
        return self._bytes.decode(b"", True) if self._bytes else self._give(self._fresh())

    def _fresh(self) -> str:
        known = self._text(self._ids[self._before : self._given])
        return self._text(self._ids[self._before :])[len(known) :]

    def _give(self, text: str) -> str:
        self._before, self._given = self._given, len(self._ids)
        return text

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids).decode("utf-8", "replace")


class StopStrings:
    """Passes text through up to the first of `stops`; `stopped` once it has come."""

    def __init__(self, stops: Sequence[str]):
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"stop: got {stops!r}; allowed: a list of texts that are not empty")
        self.stops, self.stopped, self._held = tuple(stops), False, ""

    def push(self, text: str) -> str:
        """The further text that is no part of a stop string."""
        if self.stopped:
            return ""
        self._held += text
        found = [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped, text = True, self._held[: min(found)]
            return text
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def finish(self) -> str:
        """What was held back in vain."""
        text, self._held = "" if self.stopped else self._held, ""
        return text
