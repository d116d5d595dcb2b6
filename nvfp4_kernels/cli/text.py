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
