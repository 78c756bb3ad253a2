"""inference.py: what an export says.

python -m pytest tests/test_inference.py
"""

import io
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from helpers import CHECKOUT

import inference
from train import train
from utils.errors import UserError
from utils.output import Output


@pytest.fixture
def run(tiny, quiet):
    """A run whose model has learnt something of its text."""
    return train(tiny(max_iters=60, n_embd=32, learning_rate=1e-2, eval_interval=0), output=quiet)


@pytest.fixture
def say(capsys):
    def generate(*flags: str) -> str:
        assert inference.main(["--device", "cpu", *flags]) == 0
        return capsys.readouterr().out

    return generate


def test_the_greedy_sample_of_a_small_run_is_the_golden_one(run, say):
    text = say("--prompt", "To be", "--temperature", "0", "--max-new-tokens", "25")
    assert text == "To be, that is the ms ake arow\n"


def test_which_model_speaks_is_told_apart_from_what_it_says(run, capsys):
    assert inference.main(["--device", "cpu", "--max-new-tokens", "5"]) == 0
    said = f"{run.export_dir}, step 60\nno prompt: it begins on a new line\n"
    assert capsys.readouterr().err == said


def test_the_newest_run_is_taken_by_default(run, say, tiny, quiet):
    newest = train(tiny(), output=quiet)
    assert say("--max-new-tokens=30") == say("--run", str(newest.run_dir), "--max-new-tokens=30")
    assert say("--max-new-tokens=30") != say("--run", str(run.run_dir), "--max-new-tokens=30")


def test_an_export_moved_elsewhere_is_all_that_is_needed(run, say, tmp_path, text_file):
    before = say("--max-new-tokens", "50")
    shutil.move(run.export_dir, tmp_path / "gift")
    shutil.rmtree("runs")
    text_file.unlink()
    assert say("--run", str(tmp_path / "gift"), "--max-new-tokens", "50") == before


def test_the_same_seed_says_the_same_and_another_does_not(run, say):
    assert say("--seed", "3") == say("--seed", "3")
    assert say("--seed", "3") != say("--seed", "4")


def test_the_prompt_begins_the_text_and_a_long_one_is_cropped_for_the_model_alone(run, say):
    prompt = "Whether 'tis nobler in the mind to suffer, or to be"
    assert len(prompt) > 16
    assert say("--prompt", prompt, "--max-new-tokens", "5").startswith(prompt)


def test_several_samples_are_divided_by_a_line(run, say):
    parts = say("--num-samples", "3", "--max-new-tokens", "40").split("---\n")
    assert len(parts) == 3
    assert len(set(parts)) == 3


def test_top_k_1_is_greedy_and_more_than_the_vocabulary_is_all(run, say):
    greedy = say("--temperature", "0", "--max-new-tokens", "30")
    assert say("--top-k", "1", "--max-new-tokens", "30") == greedy
    assert say("--top-k", "9999") == say()


def test_a_sample_is_never_read_as_markup(tiny, quiet, say, text_file):
    text_file.write_text("[bold]x[/bold] [red]y :smile: \\[" * 200, encoding="utf-8")
    train(tiny(max_iters=200, learning_rate=1e-2, n_embd=32), output=quiet)
    assert "[bold]x[/bold] [red]y :smile:" in say("--temperature=0", "--max-new-tokens=200")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "Zoë #"], "'#' 'Z' 'ë'"),
        (["--run", "nowhere"], "nowhere: no such model: neither nowhere nor runs/nowhere nor"),
        (["--run", "."], ".: not a Folio model: training_state.json is not there"),
        (["--runs-dir", "nowhere"], "no trained model in there yet"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--top-k", "0"], "--top-k must be at least 1"),
        (["--top-p", "0"], "--top-p must be above 0"),
        (["--top-p", "1.1"], "--top-p must be at most 1"),
        (["--min-p", "1"], "--min-p must be below 1"),
        (["--repetition-penalty", "0"], "--repetition-penalty must be at least 0.01"),
        (["--run", ""], "--run must not be empty"),
        (["--num-samples", "100001"], "--num-samples must be at most 100000"),
        (["--on-unknown", "drop"], "--on-unknown must be error, skip or replace"),
        (["--stop="], "--stop must not be empty"),
        (["--prompt", "a", "--prompt-file", "b"], "--prompt and --prompt-file both give a prompt"),
        (["--prompt-file", "nowhere"], "nowhere: no such file"),
        (["--interactive", "--json"], "--interactive asks for prompts: leave --json out"),
        (["--run", "a", "--model-name", "b"], "--run and --model-name name more than one model"),
        (["a", "--run", "b"], "--run and a name more than one model"),
        (["a", "b"], "a and b name more than one model"),
        (["nowhere"], "nowhere: no such model"),
        (["--propmt", "x"], "unknown flag --propmt; did you mean --prompt?"),
        (["--device", "cuda:9"], "--device cuda:9"),
    ],
)
def test_a_users_mistake_is_one_clear_line(run, flags, words):
    with pytest.raises(UserError) as caught:
        inference.main(flags)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_whose_text_has_no_line_end_is_prompted_with_what_it_knows(
    tiny, quiet, say, text_file
):
    text_file.write_text("abcd" * 500, encoding="utf-8")
    train(tiny(), output=quiet)
    assert set(say("--max-new-tokens", "20").strip()) <= set("abcd")


def test_an_empty_prompt_is_the_default_one_and_a_prompt_may_be_any_word(run, say):
    assert say("--prompt", "") == say()
    assert say("--prompt", "none", "--max-new-tokens=3").startswith("none")


def test_a_word_without_a_flag_names_the_model(run, say):
    assert say(str(run.run_dir)) == say("--run", str(run.run_dir))


def test_backslash_n_in_a_prompt_is_a_new_line_and_a_file_is_taken_as_it_is(run, say, tmp_path):
    expected = say("--prompt", "To be,\nor", "--max-new-tokens=9")
    assert expected.startswith("To be,\nor")
    assert say("--prompt", "To be,\\nor", "--max-new-tokens=9") == expected
    (tmp_path / "prompt.txt").write_text("To be,\nor", encoding="utf-8")
    assert say("--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens=9") == expected


def test_standard_input_is_read_for_the_prompt_dash_and_only_then(run, say, monkeypatch):
    def give(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))

    give(b"To be")
    expected = say("--prompt", "To be", "--max-new-tokens=9")
    assert sys.stdin.buffer.read() == b"To be", "it was not touched"
    give(b"To be")
    assert say("--prompt", "-", "--max-new-tokens=9") == expected
    give(b"")
    assert say("--prompt", "-") == say()
    give(b"\xff\xfe")
    with pytest.raises(UserError, match="standard input: not UTF-8 text"):
        inference.main(["--prompt", "-"])


def test_unknown_characters_are_skipped_or_replaced_on_request(run, say, capsys):
    def prompted(*flags: str) -> tuple[str, str]:
        assert inference.main(["--device=cpu", "--max-new-tokens=0", *flags]) == 0
        printed = capsys.readouterr()
        return printed.out, printed.err

    out, err = prompted("--prompt", "To #be§", "--on-unknown", "skip")
    assert (out, err.splitlines()[1]) == (
        "To be\n",
        "skipped 2 characters of the prompt that the model does not know",
    )
    out, err = prompted("--prompt", "To#be", "--on-unknown", "replace")
    assert (out, err.splitlines()[1][:20]) == ("To be\n", "replaced 1 character")
    out, err = prompted("--prompt", "##", "--on-unknown", "skip")
    assert "no prompt: it begins on a new line" in err


def test_a_prompt_longer_than_the_context_is_cropped_from_the_left_and_that_is_said(run, capsys):
    tail = "nobler in the mind"[-16:]
    outs = []
    for prompt in ("To be, or not to be, " + tail, tail):
        inference.main(["--device=cpu", "--prompt", prompt, "--max-new-tokens=9"])
        printed = capsys.readouterr()
        outs.append(printed.out.removeprefix(prompt))
        said = "the prompt has 37 characters: the model sees the last 16" in printed.err
        assert said == (len(prompt) > 16)
    assert outs[0] == outs[1]


def test_a_run_without_an_export_speaks_from_its_newest_checkpoint_and_says_so(run, capsys):
    shutil.rmtree(run.export_dir)
    assert inference.main(["--device", "cpu", "--max-new-tokens", "5"]) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert "step_00000060, step 60: its run has no export yet, and this is its newest" in first


def test_a_text_ends_before_the_first_stop_string(run, say):
    whole = say("--prompt", "To be", "--temperature=0", "--max-new-tokens=25")
    assert whole == "To be, that is the ms ake arow\n"
    flags = ("--prompt", "To be", "--temperature=0", "--max-new-tokens=25")
    assert say(*flags, "--stop", "the") == "To be, that is \n"
    assert say(*flags, "--stop", "ake", "--stop", "that is") == "To be, \n"
    assert say(*flags, "--stop", "nowhere") == whole
    assert say(*flags, "--stop", "s absent") == whole, "the beginning of one is no stop string"
    assert say(*flags, "--stop", "To be") == whole, "the prompt may have it"


def test_characters_are_shown_as_they_come(run, monkeypatch):
    pieces = []
    monkeypatch.setattr(Output, "print_piece", lambda self, piece: pieces.append(piece))
    inference.main(["--device=cpu", "--prompt", "To be", "--max-new-tokens=20", "--seed=2"])
    assert pieces[0] == "To be"
    assert len(pieces) > 15
    assert all(len(piece.strip("\n")) == 1 for piece in pieces[1:])


def test_samples_side_by_side_are_those_of_their_seeds(run, say):
    parts = say("--num-samples=3", "--seed=7", "--max-new-tokens=40").split("---\n")
    alone = [say(f"--seed={seed}", "--max-new-tokens=40") for seed in (7, 8, 9)]
    assert parts == alone


def test_json_is_one_object_with_the_text_and_what_the_model_thought(run, say, capsys):
    flags = ("--prompt", "To be", "--temperature=0", "--max-new-tokens=25")
    said = json.loads(say(*flags, "--json"))
    assert said["text"] + "\n" == say(*flags)
    assert said["prompt"] == "To be"
    assert len(said["log_probs"]) == 25
    assert all(log_prob <= 0 for log_prob in said["log_probs"])
    assert said["tokens_per_second"] > 0
    assert (said["step"], "samples" in said) == (60, False)
    stopped = json.loads(say(*flags, "--json", "--stop", "the"))
    assert (stopped["text"], len(stopped["log_probs"])) == ("To be, that is ", 10)
    assert stopped["log_probs"] == said["log_probs"][:10]
    several = json.loads(say("--json", "--num-samples=2", "--seed=5", "--max-new-tokens=9"))
    assert [each["seed"] for each in several["samples"]] == [5, 6]
    assert several["samples"][0]["text"] == several["text"]


def test_a_conversation_continues_each_line_and_survives_a_mistake(run, capsys, monkeypatch):
    lines = "To be\nZoë\nThe mind\\n\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert inference.main(["--device=cpu", "--interactive", "--max-new-tokens=5", "--seed=3"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("To be")
    assert "The mind\n" in printed.out
    assert "'Z' 'ë'" in printed.err


def test_ctrl_c_ends_a_text_and_not_the_conversation(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("To be\nThe\n"))
    speak, interrupted = inference.Speaker.speak, []

    def impatient(self, prompt, stops, output):
        if not interrupted:
            interrupted.append(prompt)
            raise KeyboardInterrupt
        speak(self, prompt, stops, output)

    monkeypatch.setattr(inference.Speaker, "speak", impatient)
    assert inference.main(["--device=cpu", "--interactive", "--max-new-tokens=5"]) == 0
    assert capsys.readouterr().out.startswith("The")


def test_in_a_conversation_the_same_prompt_is_continued_otherwise_each_time(
    run, capsys, monkeypatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO("To be\nTo be\n"))
    inference.main(["--device=cpu", "--interactive", "--max-new-tokens=15", "--temperature=1"])
    first, second = capsys.readouterr().out.split("To be")[1:]
    assert first != second


def test_a_terminal_gets_arrow_keys_history_and_ctrl_d(run, folio):
    if not hasattr(os, "openpty"):
        pytest.skip("no pseudo-terminals here")
    master, slave = os.openpty()
    command = [sys.executable, str(CHECKOUT / "inference.py"), "--interactive", "--device=cpu"]
    process = subprocess.Popen(
        [*command, "--max-new-tokens=3"], stdin=slave, stdout=slave, stderr=slave, close_fds=True
    )
    os.close(slave)
    seen = b""

    def read_until(words: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 60
        while words not in seen and time.monotonic() < deadline:
            if select.select([master], [], [], 1)[0]:
                seen += os.read(master, 4096)
        assert words in seen

    read_until(b"> ")
    os.write(master, b"To be\n")
    read_until(b"To be")
    seen = b""
    read_until(b"> ")
    os.write(master, b"\x1b[A")  # the arrow up: the line before
    read_until(b"To be")
    os.write(master, b"\n")
    seen = b""
    read_until(b"> ")
    os.write(master, b"\x04")
    assert process.wait(60) == 0
    os.close(master)


def test_nobody_listening_ends_it_quietly(run, folio):
    command = [sys.executable, str(CHECKOUT / "inference.py"), "--device=cpu"]
    process = subprocess.Popen(
        [*command, "--max-new-tokens=1000000", "--torch-compile=off"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(100)
    process.stdout.close()
    assert process.wait(60) in (0, 1, 141)
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


def test_int8_speaks_almost_as_well_and_is_refused_off_the_cpu(run, say):
    text = say(
        "--prompt", "To be", "--temperature", "0", "--max-new-tokens", "5", "--quantize=int8"
    )
    assert text.startswith("To be, ")


def test_samples_in_8_bits_do_not_depend_on_their_neighbours_either(run, say):
    flags = ("--quantize=int8", "--max-new-tokens=60", "--temperature=1")
    parts = say("--num-samples=6", "--seed=7", *flags).split("---\n")
    assert parts == [say(f"--seed={seed}", *flags) for seed in range(7, 13)]


def test_json_survives_an_output_that_is_not_utf_8(tiny, quiet, folio, text_file):
    text_file.write_text("äöü€😀" * 400, encoding="utf-8")
    train(tiny(), output=quiet)
    flags = ("--json", "--device=cpu", "--max-new-tokens=20")
    plain = folio("inference.py", *flags, env={"PYTHONIOENCODING": "utf-8"})
    ascii_only = folio("inference.py", *flags, env={"PYTHONIOENCODING": "ascii"})
    text = json.loads(ascii_only.stdout)["text"]
    assert text == json.loads(plain.stdout)["text"]
    assert set(text) <= set("äöü€😀")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_result_that_cannot_be_written_is_no_success(run):
    command = [sys.executable, str(CHECKOUT / "inference.py"), "--device=cpu", "--json"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert "standard output cannot be written" in done.stderr


@pytest.mark.parametrize("flag", ["--interactive", "--prompt=-"])
def test_standard_input_that_is_closed_is_one_line(run, monkeypatch, flag):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UserError, match="standard input is closed"):
        inference.main([flag])


def test_a_lack_of_memory_is_one_line(run, monkeypatch):
    def too_much(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("model.KeyValueCache", too_much)
    with pytest.raises(UserError, match="2 samples at once do not fit into memory: take fewer"):
        inference.main(["--device=cpu", "--num-samples=2"])


def test_the_speed_is_that_of_what_follows_the_prompt(run, say, monkeypatch):
    now = itertools.count()
    clock = types.SimpleNamespace(perf_counter=lambda: float(next(now)))
    monkeypatch.setattr(inference, "time", clock)
    said = json.loads(say("--json", "--max-new-tokens=10", "--num-samples=3"))
    assert said["tokens_per_second"] == pytest.approx(3)  # 3 texts, a clock that ticks each token
    assert json.loads(say("--json", "--max-new-tokens=1"))["tokens_per_second"] is None
