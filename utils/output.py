"""Everything that is printed.

Text goes to the terminal and, once a run has a directory, to its `console.txt`. Nothing that is
printed is read as markup, wrapped or cut: a sample may hold any character.
"""

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from utils.errors import EndedOnAnotherRank, NothingToDo, RunError, UserError
from utils.ranks import Ranks

SILENCE = 10.0  # seconds that a process gives to the one that speaks for all


class Output:
    """A command's voice.

    Args:
        quiet: nothing on standard output; a run still writes its `console.txt`, and warnings and
            errors still go to standard error.
        stream: where lines go; standard output by default.

    `exit_status` is that of a command whose result is what it prints: 1 where it could not be.
    """

    def __init__(self, *, quiet: bool = False, stream: IO[str] | None = None):
        self.quiet = quiet
        self.exit_status = 1 if stream is None and sys.stdout is None else 0
        self.console = Console(file=stream, markup=False, emoji=False, highlight=False)
        self._file: IO[str] | None = None
        self._unwritten: list[str] = []
        self._progress: _TerminalProgress | None = None

    @property
    def is_terminal(self) -> bool:
        """Whether a live display can be shown."""
        return self.console.is_terminal and not self.quiet

    def print(self, text: str = "") -> None:
        """Print one or more lines, and keep them in the record."""
        self._print(text)
        self.record(text)

    def print_piece(self, piece: str) -> None:
        """Print a piece of a text at once, as it comes; the next one follows on the same line."""
        self._print(piece, end="")

    def print_step(self, text: str) -> None:
        """A line of progress: recorded, and printed where no live bar shows the same."""
        if self._progress is None:
            self._print(text)
        self.record(text)

    def print_note(self, text: str) -> None:
        """Print to standard error what is not part of a command's result."""
        self._complain(text)

    def print_warning(self, text: str, details: str = "") -> None:
        """Print one line to standard error, and keep it in the record, with its details."""
        self._complain(f"warning: {text}")
        if details:
            self.record(details)

    def print_error(self, text: str) -> None:
        """Print one line to standard error, and keep it in the record if that can be done."""
        with contextlib.suppress(OSError):  # a full disk must not hide the message
            self._complain(f"error: {text}")

    def record_to(self, path: Path) -> None:
        """Write to `path` what was printed until now, and all that will be."""
        self._file = open(path, "a", encoding="utf-8", errors="backslashreplace")
        for text in self._unwritten:
            self.record(text)
        self._unwritten.clear()

    def close(self) -> None:
        """End the record."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    @contextlib.contextmanager
    def show_progress(self, total: int) -> Iterator["Output"]:
        """Show a live bar while the block runs, on a terminal; `advance` moves it."""
        if not self.is_terminal:
            yield self
            return
        self._progress = _TerminalProgress(self.console, total)
        try:
            with self._progress.bar:
                yield self
        finally:
            self._progress = None

    def advance(self, step: int, status: str) -> None:
        """Move the live bar to `step`, with `status` (loss, speed, time left) beside it."""
        if self._progress is not None:
            self._progress.show(step, status)

    def _print(self, text: str, end: str = "\n") -> None:
        if self.quiet:
            return
        try:
            self._write(text, end)
        except UnicodeEncodeError:  # a terminal that is not UTF-8
            encoding = self.console.file.encoding or "ascii"
            self._write(text.encode(encoding, "replace").decode(encoding), end)
        except BrokenPipeError:  # as in `python train.py | head`: the run goes on, unheard
            self.quiet = True
        except OSError as error:  # the disk that standard output goes to is full
            self.quiet, self.exit_status = True, 1
            self.warning(f"standard output cannot be written: {error.strerror}")

    def _write(self, text: str, end: str) -> None:
        if self._progress is not None:  # rich must know, to draw the bar below the text
            self.console.out(text, highlight=False)
            return
        self.console.file.write(text + end)
        self.console.file.flush()

    def record(self, text: str) -> None:
        """Keep `text` in the record without printing it."""
        if self._file is None:
            self._unwritten.append(text)
        else:
            self._file.write(text + "\n")
            self._file.flush()

    def _complain(self, text: str) -> None:
        if self._progress is not None:  # above the live bar, not through it
            self._print(text)
        else:
            with contextlib.suppress(OSError):
                if sys.stderr is not None:  # print() would take standard output instead
                    print(text, file=sys.stderr, flush=True)
        self.record(text)


class _TerminalProgress:
    """The live bar."""

    def __init__(self, console: Console, total: int):
        self.bar = Progress(
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
            console=console,
            transient=True,
            refresh_per_second=4,
        )
        self._task = self.bar.add_task("train", total=total, status="")

    def show(self, step: int, status: str) -> None:
        self.bar.update(self._task, completed=step, status=status)


def run_command(command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run a command's body and turn what it raises into lines on stderr and an exit status.

    0 is success; 2 a user's mistake, a line each; 1 a run that failed; 130 Ctrl-C. Of several
    processes, one on each machine tells of a mistake, and any of what happened to itself alone;
    the others wait to be ended, as torchrun ends all when one has, and speak if nobody did.
    """
    ranks = Ranks.from_environment()
    output = Output(quiet=ranks.rank > 0)
    who = f"rank {ranks.rank}: " if ranks.rank > 0 else ""
    try:
        return command(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if ranks.local_rank > 0:
            time.sleep(SILENCE)
        for problem in error.problems:
            output.print_error(f"{who}{problem}")
        return error.exit_status
    except RunError as error:
        output.print_error(f"{who}{error}")
        if ranks.size > 1:  # what is left of connections that broke must not be looked at again
            os._exit(error.exit_status)
        return error.exit_status
    except NothingToDo as reason:
        output.print(str(reason))
        return reason.exit_status
    except EndedOnAnotherRank as reason:
        time.sleep(SILENCE)
        return reason.exit_status
    except KeyboardInterrupt:
        output.print_error("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output has gone. Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def format_command(program: str) -> str:
    """How to start a script of the checkout, or a program of this Python, from where one is.

    `python train.py`, or `.venv/bin/python train.py` where that environment is not active.
    """
    here = Path.cwd()
    folder = Path(sys.executable).parent
    if not program.endswith(".py"):
        beside = folder / program
        is_active = shutil.which(program) == str(beside)
        return program if is_active or not beside.exists() else _shown_from(here, beside)
    found = shutil.which("python")
    is_active = found is not None and Path(found).parent == Path(sys.executable).parent
    python = "python" if is_active else sys.executable
    script = _shown_from(here, Path(__file__).resolve().parent.parent / program)
    return f"{_shown_from(here, Path(python))} {script}"


def _shown_from(here: Path, path: Path) -> str:
    inside = path.is_absolute() and path.is_relative_to(here)
    return shlex.quote(str(path.relative_to(here) if inside else path))


def pluralize(count: int, noun: str, nouns: str | None = None) -> str:
    """`1 layer`, `4 layers`; `nouns` is for those that end otherwise."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {nouns or noun + 's'}"


def format_duration(seconds: float) -> str:
    """`0:07`, `12:34` or `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def align_columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows of cells as lines, in columns as wide as need be; the columns in `right` end alike."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def format_age(seconds: float) -> str:
    """`12 seconds ago`, `3 hours ago`, `40 days ago`."""
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= size:
            return f"{pluralize(int(seconds // size), unit)} ago"
    return f"{pluralize(max(0, int(seconds)), 'second')} ago"


def format_bytes(count: float) -> str:
    """`512 B`, `1.5 KB`, `20.3 MB`: powers of 1000, as disks are sold."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
