"""Tables that commands print."""

from collections.abc import Sequence


def align_columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return rows of cells as lines with aligned columns, those in `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def align(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(f"{c:{'>' if i in right else '<'}{w}}" for i, (c, w) in enumerate(cells))

    return "\n".join(align(row).rstrip() for row in rows)
