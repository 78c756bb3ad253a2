"""Commands on a real terminal: its encoding, its end, Ctrl-C.

python -m pytest tests/test_terminal.py
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from helpers import CHECKOUT, TINY_FLAGS

pytestmark = pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")


class Window:
    """A pseudo-terminal and the process on it, which is its session's leader as a shell is."""

    def __init__(self, command: Sequence[str], environment: dict[str, str]):
        self.master, slave = os.openpty()
        self.shown = b""
        self.process = subprocess.Popen(
            # setsid --ctty, in Python: SIGHUP and Ctrl-C reach the leader's terminal only.
            [sys.executable, "-c", TAKE_TERMINAL, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
        )
        os.close(slave)

    def read_until(self, words: bytes | None = None) -> None:
        """Read until `words` were shown, or to the end."""
        with contextlib.suppress(OSError):  # EIO: the process has ended
            while words is None or words not in self.shown:
                self.shown += os.read(self.master, 65536)
        assert words is None or words in self.shown, self.shown

    def close(self) -> None:
        """Close the window."""
        if self.master is not None:
            os.close(self.master)
            self.master = None


TAKE_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored if these tests run in the background
if "NOHUP" in os.environ:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.argv[1], sys.argv[1:])
"""


@contextlib.contextmanager
def open_window(*command: str, **environment: str) -> Iterator[Window]:
    window = Window(command, environment)
    try:
        yield window
    finally:
        window.close()
        window.process.kill()
        window.process.wait()


def train_command(*flags: str) -> list[str]:
    return [sys.executable, str(CHECKOUT / "train.py"), *TINY_FLAGS, *flags]


def test_a_terminal_that_is_not_utf8_and_a_hostile_text_end_no_run(tmp_path):
    data = tmp_path / "\x1b]0;name\x07é.txt"
    data.write_text("Zoë 日本 \x1b]0;title\x07\x1b[2J\r — 🙂\n" * 60, encoding="utf-8")
    flags = (f"--data={data}", "--sample-interval=2")
    with open_window(*train_command(*flags), PYTHONIOENCODING="latin-1") as window:
        window.read_until()
        assert window.process.wait(60) == 0, window.shown
    assert b"Traceback" not in window.shown
    assert b"Sample" in window.shown
    for sequence in (b"\x1b]", b"\x1b[2J", b"\x07"):
        assert sequence not in window.shown
    (console,) = Path("runs").glob("*/logs/console.txt")
    assert "\x1b" not in console.read_text(encoding="utf-8")


def read_result() -> dict:
    (result,) = Path("runs").glob("*/meta/result.json")
    return json.loads(result.read_text(encoding="utf-8"))


def test_a_run_whose_terminal_goes_away_ends_as_if_it_had_not(text_file):
    flags = (f"--data={text_file}", "--max-iters=16", "--sample-interval=2")
    with open_window(*train_command(*flags), NOHUP="1") as window:
        window.read_until(b"sample")
        window.close()
        assert window.process.wait(60) == 0
    assert (read_result()["exit_status"], read_result()["step"]) == (0, 16)


def test_closing_the_window_saves_the_last_step_and_exits_129(text_file):
    flags = (f"--data={text_file}", "--max-iters=100000", "--sample-interval=2")
    with open_window(*train_command(*flags)) as window:
        window.read_until(b"sample")
        window.close()
        assert window.process.wait(60) == 128 + signal.SIGHUP
    result = read_result()
    assert (result["exit_status"], result["stopped_by"]) == (129, None)
    assert Path(result["checkpoint"]).name == f"step_{result['step']:08}"


STOPPED = """#!/bin/sh
trap 'echo saved; exit 130' INT
echo ready
while :; do sleep 0.1; done
"""


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
@pytest.mark.parametrize(
    ("python", "status"), [(STOPPED, -signal.SIGINT), ("#!/bin/sh\necho ready; exit 1", 2)]
)
def test_make_train_ends_by_ctrl_c_without_an_error(python, status):
    """A shell script stands for the virtual environment's python."""
    sources = ("Makefile", "pyproject.toml", "constraints.txt", "requirements-corpus.txt")
    for name in sources:
        shutil.copy(CHECKOUT / name, name)
    Path(".venv", "bin").mkdir(parents=True)
    Path(".venv", "bin", "python").write_text(python)
    Path(".venv", "bin", "python").chmod(0o755)
    Path(".venv", ".train").touch()
    with open_window(shutil.which("make"), "train") as window:
        window.read_until(b"ready")
        if python == STOPPED:
            os.write(window.master, b"\x03")
        window.read_until()
        assert window.process.wait(20) == status, window.shown
    assert (b"saved" in window.shown) == (python == STOPPED)
    assert (b"Error" in window.shown) == (python != STOPPED)
