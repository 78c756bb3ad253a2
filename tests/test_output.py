"""utils/output.py: text is printed and recorded unchanged, and errors become an exit status.

python -m pytest tests/test_output.py
"""

import io
import sys

import pytest

from utils.errors import EndedOnAnotherRank, RunError, UserError
from utils.output import Output, format_bytes, format_command, format_duration, run_command

AWKWARD = "[bold]not markup[/bold] :smile: " + "long " * 80 + "\x1b[0m 'quoted' https://x.org 😀"


def test_text_is_never_parsed_wrapped_or_highlighted():
    stream = io.StringIO()
    Output(stream=stream).print(AWKWARD)
    assert stream.getvalue() == AWKWARD + "\n"


def test_the_record_contains_text_printed_before_and_after_it_was_opened(tmp_path):
    output = Output(stream=io.StringIO())
    output.print("before")
    output.record_to(tmp_path / "console.txt")
    output.print(AWKWARD)
    output.print_step("a step")
    output.close()
    recorded = (tmp_path / "console.txt").read_text(encoding="utf-8")
    assert recorded == f"before\n{AWKWARD}\na step\n"


def test_quiet_prints_nothing_and_records_everything(tmp_path, capsys):
    output = Output(quiet=True)
    output.record_to(tmp_path / "console.txt")
    output.print("hello")
    output.close()
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "console.txt").read_text(encoding="utf-8") == "hello\n"


def test_warnings_and_errors_go_to_stderr_and_into_the_record(tmp_path, capsys):
    output = Output()
    output.record_to(tmp_path / "console.txt")
    output.print_warning("one")
    output.print_error("two")
    output.close()
    out, err = capsys.readouterr()
    assert (out, err) == ("", "warning: one\nerror: two\n")
    assert (tmp_path / "console.txt").read_text(encoding="utf-8") == err


def test_a_terminal_that_is_not_utf8_gets_question_marks():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Output(stream=stream).print("naïve 😀")
    stream.seek(0)
    assert stream.read() == "na?ve ?\n"


def test_a_closed_pipe_does_not_stop_the_run(tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    output = Output(stream=Closed())
    output.record_to(tmp_path / "console.txt")
    output.print("one")
    output.print("two")
    output.close()
    assert (tmp_path / "console.txt").read_text(encoding="utf-8") == "one\ntwo\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_the_progress_bar_and_step_lines_are_only_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    output = Output(stream=stream)
    output.record_to(tmp_path / "console.txt")
    with output.show_progress(10):
        output.advance(5, "loss 1.0000")
        output.print_step("step 5/10")
        output.print("eval")
        output._progress.refresh()
    output.close()
    assert "loss 1.0000" in stream.getvalue()
    assert "step 5/10" not in stream.getvalue()
    assert (tmp_path / "console.txt").read_text(encoding="utf-8") == "step 5/10\neval\n"


def test_a_full_disk_behind_stdout_is_one_warning(tmp_path, capsys):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    output = Output(stream=Full())
    output.record_to(tmp_path / "console.txt")
    output.print("one")
    output.print("two")
    output.close()
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning:") and "No space left on device" in warning
    assert output.exit_status == 1
    recorded = (tmp_path / "console.txt").read_text(encoding="utf-8")
    assert [line for line in recorded.splitlines() if "warning" not in line] == ["one", "two"]


@pytest.mark.parametrize(
    ("raised", "status", "lines"),
    [
        (UserError("first", "second"), 2, "error: first\nerror: second\n"),
        (RunError("out of luck"), 1, "error: out of luck\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_an_error_becomes_lines_on_stderr_and_an_exit_status(raised, status, lines, capsys):
    def command(argv):
        raise raised

    assert run_command(command, []) == status
    assert capsys.readouterr() == ("", lines)


def test_a_bug_keeps_its_traceback():
    def command(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(command, [])


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (7.4, "0:07"), (754, "12:34"), (3723, "1:02:03")]
)
def test_durations_are_hours_minutes_seconds(seconds, shown):
    assert format_duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(512, "512 B"), (1500, "1.5 KB"), (20_300_000, "20.3 MB"), (5e12, "5000.0 GB")],
)
def test_sizes_are_powers_of_1000(count, shown):
    assert format_bytes(count) == shown


def test_printed_commands_use_this_python_relative_to_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert format_command("train.py").startswith(".venv/bin/python ")
    assert format_command("tensorboard") == "tensorboard"
    (tmp_path / ".venv" / "bin" / "tensorboard").touch()
    assert format_command("tensorboard") == ".venv/bin/tensorboard"


@pytest.mark.parametrize(
    ("error", "printed"),
    [(UserError("wrong"), "error: rank 1: wrong\n"), (EndedOnAnotherRank(2), "")],
)
def test_another_rank_waits_for_torchrun_to_end_it_before_it_prints(
    monkeypatch, capsys, error, printed
):
    for name, value in (("RANK", 1), ("LOCAL_RANK", 1), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    slept = []
    monkeypatch.setattr("time.sleep", lambda s: slept.append((s, *capsys.readouterr())))

    def fail(argv):
        raise error

    assert run_command(fail, []) == 2
    assert slept == [(10, "", "")] and capsys.readouterr() == ("", printed)
