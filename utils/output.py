"""Console output: lines, warnings, a progress bar, and the exit status of a command.

Text goes to the terminal and, within a run, to its `console.txt`. It is never parsed as markup,
wrapped or truncated: a sample may contain any character.
"""

import contextlib
import io
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from utils.errors import EndedOnAnotherRank, NothingToDo, RunError, UserError
from utils.files import is_file
from utils.ranks import Ranks

TORCHRUN_GRACE = 10.0  # seconds that the other ranks leave torchrun to end them


class Output:
    """Print a command's output, and record it for `console.txt`.

    `quiet` prints nothing on standard output; warnings, errors and the record are unaffected.
    `exit_status` is 1 if standard output could not be written, for a command whose result that is.
    """

    def __init__(self, *, quiet: bool = False, stream: IO[str] | None = None):
        self.quiet = quiet
        self.exit_status = 1 if stream is None and sys.stdout is None else 0
        self.console = Console(file=stream, markup=False, emoji=False, highlight=False)
        if isinstance(self.console.file, io.TextIOWrapper):  # perhaps a terminal that is not UTF-8
            self.console.file.reconfigure(errors="replace")
        self._record = io.StringIO()  # until there is a file
        self._progress: Progress | None = None

    def print(self, text: str = "") -> None:
        """Print and record one or more lines."""
        self._print(text)
        self.record(text)

    def print_piece(self, piece: str) -> None:
        """Print a piece of text without a line break, and flush."""
        self._print(piece, end="")

    def print_step(self, text: str) -> None:
        """Record a step line, and print it unless a progress bar shows the same."""
        if self._progress is None:
            self._print(text)
        self.record(text)

    def print_note(self, text: str) -> None:
        """Print to standard error, and record, a line that is not part of a command's result."""
        if self._progress is not None:  # above the bar, not through it
            self._print(text)
        elif sys.stderr is not None:  # else print() would take standard output
            with contextlib.suppress(OSError):
                print(text, file=sys.stderr, flush=True)
        self.record(text)

    def print_warning(self, text: str, details: str = "") -> None:
        """Print one line to standard error, and record it together with its details."""
        self.print_note(f"warning: {text}")
        if details:
            self.record(details)

    def print_error(self, text: str) -> None:
        """Print one line to standard error, and record it if possible."""
        with contextlib.suppress(OSError):  # a full disk must not hide the message
            self.print_note(f"error: {text}")

    def record(self, text: str) -> None:
        """Record `text` without printing it."""
        self._record.write(text + "\n")
        self._record.flush()

    def record_to(self, path: Path) -> None:
        """Write everything recorded so far, and from now on, to `path`."""
        file = open(path, "a", encoding="utf-8", errors="backslashreplace")
        file.write(self._record.getvalue())
        self._record = file

    def close(self) -> None:
        """Close the record."""
        record, self._record = self._record, io.StringIO()
        record.close()

    @contextlib.contextmanager
    def show_progress(self, total: int) -> Iterator[None]:
        """Show a progress bar within the block, if on a terminal; `advance` moves it."""
        if self.quiet or not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}"),
        )
        with Progress(*columns, console=self.console, transient=True, refresh_per_second=4) as bar:
            bar.add_task("train", total=total, status="")
            self._progress = bar
            try:
                yield
            finally:
                self._progress = None

    def advance(self, step: int, status: str) -> None:
        """Move the progress bar to `step`, with `status` (loss, speed, time left) beside it."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, status=status)

    def _print(self, text: str, end: str = "\n") -> None:
        if self.quiet:
            return
        try:
            if self._progress is not None:  # rich then redraws the bar below the text
                self.console.out(text, highlight=False)
            else:
                self.console.file.write(text + end)
                self.console.file.flush()
        except BrokenPipeError:  # as in `python train.py | head`: the run continues
            self.quiet = True
        except OSError as error:  # standard output is a file on a full disk
            self.quiet, self.exit_status = True, 1
            self.print_warning(f"standard output cannot be written: {error.strerror}")


def run_command(command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run a command, and turn the errors it raises into lines on stderr and an exit status.

    0 is success, 2 a user's mistake (one line a problem), 1 a failed run, 130 Ctrl-C. Under
    torchrun the first rank of each machine prints a mistake, and every rank its own failure. The
    others wait until torchrun ends them; if it does not, they print too.
    """
    ranks = Ranks.from_environment()
    output = Output(quiet=ranks.rank > 0)
    prefix = f"rank {ranks.rank}: " if ranks.rank > 0 else ""
    try:
        return command(sys.argv[1:] if argv is None else argv)
    except NothingToDo as reason:
        output.print(str(reason))
        return reason.exit_status
    except EndedOnAnotherRank as reason:
        time.sleep(TORCHRUN_GRACE)
        return reason.exit_status
    except (UserError, RunError) as error:
        has_failed = isinstance(error, RunError)
        if ranks.local_rank > 0 and not has_failed:
            time.sleep(TORCHRUN_GRACE)
        for problem in str(error).split("\n"):
            output.print_error(f"{prefix}{problem}")
        if ranks.size > 1 and has_failed:  # an exit would wait for connections that are broken
            os._exit(error.exit_status)
        return error.exit_status
    except KeyboardInterrupt:
        output.print_error("interrupted")
        return 130


def format_command(program: str) -> str:
    """Return the shell command for a script of the checkout or a program of this environment.

    `python train.py`, or `.venv/bin/python train.py` if that environment is not active.
    """
    python = Path(sys.executable)
    is_script = program.endswith(".py")
    path = python if is_script else python.parent / program
    name = "python" if is_script else program
    is_active = Path(shutil.which(name) or "").parent == path.parent
    command = name if is_active or not is_file(path) else _format_path(path)
    script = Path(__file__).resolve().parent.parent / program
    return f"{command} {_format_path(script)}" if is_script else command


def _format_path(path: Path) -> str:
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def pluralize(count: int, noun: str) -> str:
    """Return `1 layer` or `4 layers`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def format_duration(seconds: float) -> str:
    """Return `0:07`, `12:34` or `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_bytes(count: float) -> str:
    """Return `512 B`, `1.5 KB`, `20.3 MB`: powers of 1000, at most GB."""
    if count < 1000:
        return f"{count:.0f} B"
    power = 1 + (count >= 1e6) + (count >= 1e9)
    return f"{count / 1000**power:.1f} {' KMG'[power]}B"


def format_char_counts(counts: Mapping[str, int]) -> str:
    """Format characters and their counts, the first twenty: `'é' (12 times), 'ß' (once)`."""
    shown = [
        f"{char!r} ({'once' if count == 1 else f'{count:,} times'})"
        for char, count in list(counts.items())[:20]
    ]
    return ", ".join(shown) + (f" and {len(counts) - 20} more" if len(counts) > 20 else "")
