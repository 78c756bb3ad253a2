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


class NothingToDo(Exception):
    """What was asked for is there already, as one line. Nothing was changed; a command exits 0."""

    exit_status = 0
