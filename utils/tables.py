"""Tables that commands print."""

from collections.abc import Sequence

from rich.cells import cell_len


def align_columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return rows of cells as lines with aligned columns, those in `right` to the right.

    A Chinese character or an emoji is two columns of a terminal wide, an accent none.
    """
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]

    def pad(index: int, cell: str) -> str:
        space = " " * (widths[index] - cell_len(cell))
        return space + cell if index in right else cell + space

    lines = ("  ".join(pad(index, cell) for index, cell in enumerate(row)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
