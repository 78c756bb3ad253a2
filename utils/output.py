"""Console output: lines, warnings, a progress bar, and the exit status of a command.

Text goes to the terminal and, within a run, to its `console.txt`, both without control characters.
A pipe receives it unchanged. It is never parsed as markup, wrapped or truncated: a sample may
contain any character.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from utils.errors import EndedOnAnotherRank, NothingToDo, RunError, UserError
from utils.files import is_file
from utils.ranks import Ranks

TORCHRUN_GRACE = 10.0  # seconds that the other ranks leave torchrun to end them


# C0 but tab and new line, DEL, C1; Unicode's line separators and controls of writing direction.
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def escape_control(text: str) -> str:
    r"""Escape characters that could drive a terminal, as `\x1b`; CR and CRLF become new lines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text)


class Stream:
    """Standard output or error. After a write fails, as on a closed terminal, text is dropped.

    `failure` is the first error, None as long as there is none.
    """

    def __init__(self, stream: IO[str] | None):
        self.failure = None if stream is not None else ValueError("the stream is closed")
        self._stream = stream

    def write(self, text: str) -> None:
        """Write, and flush, unless a write has failed."""
        if self.failure is None:
            try:
                self._stream.write(text)
                self._stream.flush()
            except (OSError, ValueError) as error:  # ValueError: Python has closed it
                self.failure = error

    def isatty(self) -> bool:
        """Return whether this is a terminal."""
        try:
            return self.failure is None and self._stream.isatty()
        except (ValueError, AttributeError):  # AttributeError: an object that can only be written
            return False

    def flush(self) -> None:
        """Do nothing: `write` flushes."""

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the stream that rich asks for: its encoding or its descriptor."""
        return getattr(self._stream, name)


class LogFile:
    """A text file that a run appends to, line by line, so that a kill loses no line."""

    def __init__(self, path: Path):
        self._path, self._file = path, self._open(path)

    @staticmethod
    def _open(path: Path) -> IO[str]:
        # A lone surrogate is written as an escape, which is also valid JSON.
        return open(path, "a", 1, encoding="utf-8", errors="backslashreplace")

    def write(self, text: str) -> None:
        """Append text that ends with a new line."""
        self._file.write(text)

    def reopen_if_lost(self) -> str | None:
        """Append to a new file, and return a warning, if the file was deleted or replaced.

        Raises `RunError` if the run's directory was deleted, or no file stands at the path.
        """
        try:
            is_lost = not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except OSError as error:  # others may be a network drive that is away for a while
            is_lost = isinstance(error, (FileNotFoundError, NotADirectoryError))
        if not is_lost:
            return None
        if self._path.exists() and not self._path.is_file():  # opening a pipe would block
            raise RunError(f"{self._path} is no file any more, so the run cannot go on")
        logs = self._path.parent
        try:
            logs.mkdir(exist_ok=True)
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(f"{logs.parent} was deleted or moved, so the run cannot go on") from None
        self.close()
        self._file = self._open(self._path)
        return f"{self._path} was deleted or replaced: what follows goes into a new file"

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Output:
    """Print a command's output, and record it for `console.txt`.

    `quiet` prints nothing on standard output; warnings, errors and the record are unaffected.
    `exit_status` is 1 if standard output could not be written, for a command whose result that is.
    """

    def __init__(self, *, quiet: bool = False, stream: IO[str] | None = None):
        self.quiet = quiet
        stream = sys.stdout if stream is None else stream
        if isinstance(stream, io.TextIOWrapper):  # perhaps a terminal that is not UTF-8
            stream.reconfigure(errors="replace")
        self._stream = Stream(stream)
        self.exit_status = 1 if self._stream.failure else 0
        self.console = Console(file=self._stream, markup=False, emoji=False, highlight=False)
        self._new_lines = io.IncrementalNewlineDecoder(None, translate=True)
        self._unfiled = io.StringIO()  # the record until there is a file
        self._record: LogFile | None = None
        self._progress: Progress | None = None

    def print(self, text: str = "") -> None:
        """Print and record one or more lines."""
        self._print(text)
        self.record(text)

    def print_piece(self, piece: str, style: str = "") -> None:
        """Print a piece of text without a line break, in a style of rich's on a terminal."""
        self._print(piece, end="", style=style)

    def print_drawing(self, text: Text) -> None:
        """Print lines in colour, without control characters."""
        if not self.quiet:
            self.console.print(text, soft_wrap=True)
            self._check_stream()

    def print_step(self, text: str) -> None:
        """Record a step line, and print it unless a progress bar shows the same."""
        if self._progress is None:
            self._print(text)
        self.record(text)

    def print_note(self, text: str) -> None:
        """Print to standard error, and record, a line that is not part of a command's result."""
        if self._progress is not None and not self.quiet:  # above the bar, not through it
            self._print(text)
        else:
            stream = Stream(sys.stderr)
            stream.write((escape_control(text) if stream.isatty() else text) + "\n")
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
        line = escape_control(text) + "\n"
        if self._record is None:
            self._unfiled.write(line)
            return
        with contextlib.suppress(RunError):  # raised where the run logs its next step
            if warning := self._record.reopen_if_lost():
                self.print_warning(warning)
        self._record.write(line)

    def record_to(self, path: Path) -> None:
        """Write everything recorded so far, and from now on, to `path`."""
        self._record = LogFile(path)
        self._record.write(self._unfiled.getvalue())
        self._unfiled = io.StringIO()

    def close(self) -> None:
        """Close the record."""
        record, self._record = self._record, None
        if record is not None:
            with contextlib.suppress(OSError):  # lines that a full disk refused before
                record.close()

    @contextlib.contextmanager
    def show_progress(self, total: int, start: int = 0) -> Iterator[None]:
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
            bar.add_task("train", total=total, completed=start, status="")
            self._progress = bar
            try:
                yield
            finally:
                self._progress = None

    def advance(self, step: int, status: str) -> None:
        """Move the progress bar to `step`, with `status` (loss, speed, time left) beside it."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, status=status)

    def _print(self, text: str, end: str = "\n", style: str = "") -> None:
        if self.quiet:
            return
        if is_terminal := self._stream.isatty():
            # The next piece may show whether a CR at the end of this one is half of a CRLF.
            text = escape_control(self._new_lines.decode(text, final=end != ""))
        if self._progress is not None or (is_terminal and style):
            # rich then redraws the bar below the text
            self.console.out(text, end=end, style=style or None, highlight=False)
        else:
            self._stream.write(text + end)
        self._check_stream()

    def _check_stream(self) -> None:
        """Print nothing more if standard output could not be written."""
        failure = self._stream.failure
        if failure is None or self.quiet:
            return
        self.quiet = True
        if not isinstance(failure, BrokenPipeError):  # as in `python train.py | head`
            self.exit_status = 1
            reason = getattr(failure, "strerror", None) or failure
            self.print_warning(f"standard output cannot be written: {reason}")


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
