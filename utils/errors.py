"""The ways in which a command ends early, and the exit status of each."""


class UserError(ValueError):
    """A mistake of the user's: one line a problem, each saying what, where and what to do.

    Raised before a run directory exists. A command prints the problems and exits with 2.
    """

    exit_status = 2

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class RunError(RuntimeError):
    """A run that could not go on, as one line. The run is closed; a command exits with 1."""

    exit_status = 1


class Aborted(SystemExit):
    """A second SIGTERM: unlike the `sys.exit()` of a user's callback, it ends the run."""


class NothingToDo(Exception):
    """What was asked for is there already, as one line. Nothing was changed; a command exits 0."""

    exit_status = 0


class EndedOnAnotherRank(Exception):
    """The run has ended in another of its processes, which says why: this one ends in silence."""

    def __init__(self, exit_status: int):
        super().__init__(f"ended in another process, with status {exit_status}")
        self.exit_status = exit_status


def format_reason(error: BaseException) -> str:
    """What an exception says, in one line; its type where it says nothing, or cannot."""
    try:
        lines = str(error).split("\n")
    except Exception:  # whoever wrote its __str__
        lines = []
    return next((" ".join(line.split()) for line in lines if line.strip()), type(error).__name__)
