"""inference.py: what an export says.

python -m pytest tests/test_inference.py
"""

import shutil

import pytest

import inference
from train import train
from utils.errors import UserError


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
    assert text == "To be, that is the mind to s a\n"


def test_which_model_speaks_is_told_apart_from_what_it_says(run, capsys):
    assert inference.main(["--device", "cpu", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().err == f"{run.export_dir}, step 60\n\n"


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
        (["--prompt", "Zoë #"], "does not know '#' 'Z' 'ë'"),
        (["--run", "nowhere"], "nowhere: no such model: neither nowhere nor runs/nowhere nor"),
        (["--run", "."], ".: not a Folio model: training_state.json is not there"),
        (["--runs-dir", "nowhere"], "no trained model in there yet"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--top-k", "0"], "--top-k must be at least 1"),
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
