"""Tokens to text while they come: no piece ends within a character, and none holds what may yet become a stop string."""

import codecs
from collections.abc import Sequence

_REPLACEMENT = "\ufffd"
_MOST = 3  # replacement characters that an unfinished character may show as: one for each byte that is there


class Detokenizer:
    """Decodes a growing list of ids piece by piece.

    tokenizer: has decode(ids) -> bytes and bytewise. Where each id stands for its bytes whatever comes before, the pieces are
    those bytes. Otherwise new tokens are decoded together with those of the piece before, since a decoder may treat the first
    token otherwise (a leading space), and U+FFFD at the end, maybe an unfinished character, is held back.
    before: the tokens that the list follows, whose text is given already.
    """

    def __init__(self, tokenizer, before: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace") if tokenizer.bytewise else None
        # the last tokens that ended with a character, and those since
        self._ids: list[int] = [] if tokenizer.bytewise else self._end_of(before)
        self._whole = len(self._ids)  # how many of them ended with one
        self._given = self._text().rstrip(_REPLACEMENT)  # of their text, what was given

    def push(self, ids: Sequence[int]) -> str:
        """The further text that is certain."""
        if self._bytes:
            return self._bytes.decode(self.tokenizer.decode(ids))
        return "".join(map(self._push, ids))

    def finish(self) -> str:
        """What was held back: an unfinished character becomes U+FFFD."""
        return self._bytes.decode(b"", True) if self._bytes else self._text()[len(self._given) :]

    def _push(self, token: int) -> str:
        self._ids.append(token)
        text = self._text()
        held = len(text) - len(text.rstrip(_REPLACEMENT))
        if text.startswith(self._given):  # else an unfinished character has taken those before it along (byte fallback)
            held = min(held, _MOST)
        piece = text[len(self._given) : len(text) - held]
        self._given += piece
        if piece and not held:  # tokens without text, special ones, are no piece that others can begin behind
            self._ids = self._ids[self._whole :]
            self._whole, self._given = len(self._ids), self._text()
        return piece

    def _end_of(self, before: Sequence[int]) -> list[int]:
        """Some last tokens with a text that begins with a whole character; all where there are none."""
        for count in (1 << n for n in range(len(before).bit_length())):
            text = self.tokenizer.decode(before[-count:])
            if text and not text.startswith(_REPLACEMENT.encode()):
                return list(before[-count:])
        return list(before)

    def _text(self) -> str:
        return self.tokenizer.decode(self._ids).decode("utf-8", "replace")


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
