"""Plain tables."""

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows of cells as aligned lines; the columns in `right` are aligned to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def ranges(numbers: Sequence[int]) -> str:
    """Indices in few letters: 0,2,4 or, of many, 0,2..22: 12."""
    if len(numbers) > 4:
        return f"{numbers[0]},{numbers[1]}..{numbers[-1]}: {len(numbers)}"
    return ",".join(map(str, numbers))


def check_text(argument: str, text: str, otherwise: str = "") -> None:
    """Raises ValueError for an empty text, and for bytes of a command line that are none: Python makes surrogates of them."""
    if not text:
        raise ValueError(f"{argument}: got ''; allowed: a text that is not empty{otherwise}")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{argument}: got {ascii(text)}, which is no UTF-8; allowed: a text in UTF-8")
