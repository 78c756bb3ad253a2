"""The ways in which a command ends early, and the exit status of each."""

import unicodedata


class UserError(ValueError):
    """A user's mistake: `problems` has one line each, with what, where and what to do.

    Raised before a run directory exists. The command prints the problems and exits with 2.
    """

    exit_status = 2

    def __init__(self, *problems: str):
        self.problems = tuple(map(escape_unprintable, problems))  # a path may have a line break
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), self.problems


class RunError(RuntimeError):
    """A run failed, in one line. The run is closed; the command exits with 1."""

    exit_status = 1


class Aborted(SystemExit):
    """A second SIGTERM. It ends the run, which a `sys.exit()` in a user's callback does not."""


class NothingToDo(Exception):
    """The requested result exists already, in one line. The command exits with 0."""

    exit_status = 0


class EndedOnAnotherRank(Exception):
    """The run ended on another rank, which prints why; this process prints nothing."""

    def __init__(self, exit_status: int):
        super().__init__(f"ended in another process, with status {exit_status}")
        self.exit_status = exit_status


def escape_unprintable(text: str) -> str:
    r"""Escape characters that could break a line or drive a terminal, as `\n` and `\x1b`."""
    return "".join(
        char if char.isprintable() or unicodedata.category(char) == "Zs" else ascii(char)[1:-1]
        for char in text
    )


def format_reason(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if there is none."""
    try:
        lines = str(error).split("\n")
    except Exception:  # raised by a user's __str__
        lines = []
    return next((" ".join(line.split()) for line in lines if line.strip()), type(error).__name__)
