"""utils/output.py: what is printed and recorded, and how errors become an exit status.

python -m pytest tests/test_output.py
"""

import io
import os
import shutil
import sys
from pathlib import Path

import pytest

from utils.errors import EndedOnAnotherRank, RunError, UserError
from utils.output import (
    LogFile,
    Output,
    escape_control,
    format_bytes,
    format_command,
    format_duration,
    run_command,
)

HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\x7f\x08\0\u202eabc\u2066"
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
    assert recorded == f"before\n{escape_control(AWKWARD)}\na step\n"


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


def test_control_characters_are_escaped_and_all_else_stays():
    escaped = "\\x1b]0;title\\x07\\x1b[2J\\x9b31m\\x7f\\x08\\x00\\u202eabc\\u2066"
    assert escape_control(HOSTILE) == escaped
    assert escape_control("é 漢\u00a0👨\u200d👩\u200c\t\n") == "é 漢\u00a0👨\u200d👩\u200c\t\n"
    assert escape_control("a\rb\r\nc\r") == "a\nb\nc\n"


def print_everywhere(output: Output) -> None:
    output.print(HOSTILE)
    output.print_piece(HOSTILE)
    output.print_piece(HOSTILE, style="bold")
    for print_line in (output.print_note, output.print_warning, output.print_error):
        print_line(f"{HOSTILE}: no such file")
    with output.show_progress(9):
        output.print(HOSTILE)
        output.print_note(HOSTILE)
        output.advance(1, "loss 1.0000")


def test_no_control_character_reaches_a_terminal_or_the_record(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    output = Output()
    output.record_to(tmp_path / "console.txt")
    print_everywhere(output)
    output.close()
    shown = sys.stdout.getvalue() + sys.stderr.getvalue()
    for sequence in ("\x1b]", "\x1b[2J", "\x9b", "\x7f", "\x08", "\x07", "\0", "\u202e"):
        assert sequence not in shown
    assert shown.count(escape_control(HOSTILE)) == 8
    recorded = (tmp_path / "console.txt").read_text(encoding="utf-8")
    assert recorded == escape_control(recorded)
    assert recorded.count("x1b]0") == 6


def test_a_pipe_receives_the_text_unchanged():
    stream = io.StringIO()
    output = Output(stream=stream)
    output.print_piece(HOSTILE + "\r", style="bold")
    output.print_piece("\n\r")
    assert stream.getvalue() == HOSTILE + "\r\n\r"


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [(["a\r", "\nb"], "a\nb\n"), (["a\r", "b"], "a\nb\n"), (["a", "\r"], "a\n\n")],
)
def test_a_cr_at_the_border_of_two_pieces_is_one_line_end(pieces, shown):
    output = Output(stream=Terminal())
    for piece in pieces:
        output.print_piece(piece)
    output.print()
    assert output._stream.getvalue() == shown


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


def test_a_resumed_run_begins_its_bar_at_its_first_step(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    output = Output(stream=Terminal())
    with output.show_progress(10, start=4):
        pass
    assert "4/10" in output._stream.getvalue() and "0/10" not in output._stream.getvalue()


class GoneTerminal(Terminal):
    """A terminal whose window was closed after so many writes."""

    def __init__(self, writes: int, error: Exception):
        super().__init__()
        self.writes, self.error = writes, error

    def write(self, text):
        self.writes -= 1
        if self.writes < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("writes", range(6))
@pytest.mark.parametrize("error", [OSError(5, "EIO"), BrokenPipeError(), ValueError("closed")])
def test_a_terminal_that_goes_away_ends_neither_the_bar_nor_the_record(
    tmp_path, monkeypatch, writes, error
):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", GoneTerminal(0, error))
    output = Output(stream=GoneTerminal(writes, error))
    output.record_to(tmp_path / "console.txt")
    with output.show_progress(10):
        output.advance(5, "loss 1.0000")
        output._progress.refresh()
        output.print("sample")
        output.print_warning("a tracker")
        output._progress.refresh()
    output.print("done")
    output.close()
    recorded = (tmp_path / "console.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in recorded if "standard output" not in line] == [
        "sample",
        "warning: a tracker",
        "done",
    ]


def test_closed_standard_streams_end_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    output = Output()
    print_everywhere(output)
    assert output.exit_status == 1


def test_a_console_file_that_is_deleted_or_replaced_goes_on_in_a_new_one(tmp_path, capsys):
    path, other = tmp_path / "logs" / "console.txt", tmp_path / "other"
    path.parent.mkdir()
    output = Output()
    output.record_to(path)
    output.print("one")
    path.unlink()
    output.print("two")
    other.write_text("other\n")
    other.replace(path)
    output.print("three")
    output.close()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("other", "three", 3)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and all(str(path) in line for line in warnings)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_log_file_that_became_a_pipe_is_an_error_that_names_it(tmp_path):
    log = LogFile(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(RunError, match=str(tmp_path / "metrics.jsonl")):
        log.reopen_if_lost()
    log.close()


def test_a_log_file_whose_drive_is_away_goes_on(tmp_path, monkeypatch):
    log = LogFile(tmp_path / "metrics.jsonl")

    def fail(self, **options):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "stat", fail)
        assert log.reopen_if_lost() is None
    log.write("one\n")
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "one\n"


def test_a_log_file_of_a_deleted_run_is_an_error_that_names_the_run(tmp_path):
    run = tmp_path / "runs" / "job"
    (run / "logs").mkdir(parents=True)
    log = LogFile(run / "logs" / "metrics.jsonl")
    shutil.rmtree(run)
    with pytest.raises(RunError, match=str(run)):
        log.reopen_if_lost()
    log.close()


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
