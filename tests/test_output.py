"""utils/output.py: what is printed is what was meant.

python -m pytest tests/test_output.py
"""

import io
import sys

import pytest

from utils.errors import EndedOnAnotherRank, RunError, UserError
from utils.output import Output, format_bytes, format_command, format_duration, run_command

AWKWARD = "[bold]not markup[/bold] :smile: " + "long " * 80 + "\x1b[0m 'quoted' https://x.org 😀"


def test_text_is_never_markup_never_wrapped_and_never_highlighted():
    stream = io.StringIO()
    Output(stream=stream).print(AWKWARD)
    assert stream.getvalue() == AWKWARD + "\n"


def test_the_record_holds_what_was_printed_before_and_after_it_began(tmp_path):
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


def test_a_reader_that_has_gone_does_not_stop_the_run(tmp_path):
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    output = Output(stream=Gone())
    output.record_to(tmp_path / "console.txt")
    output.print("one")
    output.print("two")
    output.close()
    assert (tmp_path / "console.txt").read_text(encoding="utf-8") == "one\ntwo\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_step_lines_are_recorded_and_the_bar_is_shown(tmp_path, monkeypatch):
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
    assert capsys.readouterr().err == (
        "warning: standard output cannot be written: No space left on device\n"
    )
    recorded = (tmp_path / "console.txt").read_text(encoding="utf-8")
    assert [line for line in recorded.splitlines() if "warning" not in line] == ["one", "two"]


@pytest.mark.parametrize(
    ("raised", "status", "words"),
    [
        (UserError("first", "second"), 2, "error: first\nerror: second\n"),
        (RunError("out of luck"), 1, "error: out of luck\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_a_command_answers_with_lines_and_a_status(raised, status, words, capsys):
    def command(argv):
        raise raised

    assert run_command(command, []) == status
    assert capsys.readouterr() == ("", words)


def test_a_bug_is_not_hidden():
    def command(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(command, [])


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (7.4, "0:07"), (754, "12:34"), (3723, "1:02:03")]
)
def test_durations_read_like_a_clock(seconds, shown):
    assert format_duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(512, "512 B"), (1500, "1.5 KB"), (20_300_000, "20.3 MB"), (5e12, "5000.0 GB")],
)
def test_sizes_read_like_a_disk(count, shown):
    assert format_bytes(count) == shown


def test_next_commands_start_this_python_from_here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert format_command("train.py").startswith(".venv/bin/python ")
    assert format_command("tensorboard") == "tensorboard"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "tensorboard").touch()
    assert format_command("tensorboard") == ".venv/bin/tensorboard"


@pytest.mark.parametrize(
    ("error", "told"), [(UserError("wrong"), "error: rank 1: wrong\n"), (EndedOnAnotherRank(2), "")]
)
def test_a_process_leaves_the_word_and_the_end_to_the_one_that_speaks_for_all(
    monkeypatch, capsys, error, told
):
    """torchrun ends all when one has: if this one is left, nobody has spoken, and it does."""
    for name, value in (("RANK", 1), ("LOCAL_RANK", 1), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    slept = []
    monkeypatch.setattr("time.sleep", lambda s: slept.append((s, *capsys.readouterr())))

    def fail(argv):
        raise error

    assert run_command(fail, []) == 2
    assert slept == [(10, "", "")] and capsys.readouterr() == ("", told)
