"""`size: auto`: a shape for a text and a time, recorded as if a user had chosen it."""

import json
from types import SimpleNamespace

import pytest
import torch

import budget
import trainer
from data import load_dataset
from distributed import World
from parameters import SHAPE_SETTINGS
from trainer import train
from utils.errors import UserError
from utils.sizes import SIZES, Size, choose_size, predict_loss

TOKENS_PER_STEP = 2048
LARGE_TEXT, SMALL_TEXT = 10**9, 10**6


def take_steps(seconds: float, flops: float = 1e11):
    """Return the steps of each size on a machine of so many FLOP/s."""
    return lambda size: int(seconds * flops / (6 * size.num_weights * TOKENS_PER_STEP))


def choose(seconds: float, text: int = LARGE_TEXT) -> Size:
    return choose_size(take_steps(seconds), TOKENS_PER_STEP, text, SIZES).size


def test_more_tokens_and_more_weights_lower_the_predicted_loss():
    losses = [predict_loss(10**6, tokens, LARGE_TEXT) for tokens in (10**5, 10**6, 10**7)]
    assert losses == sorted(losses, reverse=True)
    assert predict_loss(10**7, 10**7, LARGE_TEXT) < predict_loss(10**6, 10**7, LARGE_TEXT)


def test_a_second_reading_of_a_text_is_worth_less_than_new_text():
    once, twice = (predict_loss(10**6, n * SMALL_TEXT, SMALL_TEXT) for n in (1, 2))
    assert twice < once
    assert predict_loss(10**6, 2 * SMALL_TEXT, LARGE_TEXT) < twice
    # A hundred readings are hardly worth more than fifty.
    assert predict_loss(10**6, 10**8, SMALL_TEXT) == pytest.approx(
        predict_loss(10**6, 5 * 10**7, SMALL_TEXT), abs=1e-3
    )


def test_the_chosen_size_grows_with_the_time():
    sizes = [choose(seconds).num_weights for seconds in (1, 60, 600, 6000, 60000)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] < sizes[-1]


def test_a_size_that_does_not_fit_into_memory_is_not_chosen():
    def count_steps(size: Size) -> int:
        return 0 if size == SIZES[2] else 10**6

    assert choose_size(count_steps, TOKENS_PER_STEP, LARGE_TEXT, SIZES).size == SIZES[1]


def test_larger_sizes_are_not_measured_once_one_is_worse():
    measured = []

    def count_steps(size: Size) -> int:
        measured.append(size)
        return take_steps(10)(size)

    choose_size(count_steps, TOKENS_PER_STEP, LARGE_TEXT, SIZES)
    assert len(measured) < len(SIZES)


@pytest.fixture
def small_sizes(monkeypatch):
    """Sizes that train in a moment, instead of those that a user gets."""
    sizes = (Size(1, 8, 1), Size(1, 16, 2))
    monkeypatch.setattr(budget, "SIZES", sizes)
    return sizes


def test_the_chosen_size_is_recorded_with_its_source(tiny, quiet, small_sizes):
    result = train(tiny(max_iters=None, max_minutes=0.01, size="auto"), output=quiet)
    record = json.loads((result.run_dir / "meta" / "full_config.json").read_text(encoding="utf-8"))
    assert Size(*(record["config"][name] for name in SHAPE_SETTINGS)) in small_sizes
    assert record["config"]["size"] is None  # a repeated run has the same size
    assert record["sources"]["n_layer"] == "size auto (train())"
    assert record["config"]["max_iters"] == result.step


def test_auto_refuses_a_time_in_which_a_text_would_be_read_too_often(
    tiny, small_sizes, monkeypatch
):
    monkeypatch.setattr(budget, "measure_speed", lambda *args, **kwargs: (1e-4, 1e-4))
    with pytest.raises(UserError, match="small_text"):
        trainer.prepare_trainer(tiny(max_iters=None, max_minutes=10, size="auto"))
    trainer.prepare_trainer(tiny(max_iters=None, max_minutes=1e-4, size="auto"))


def test_ranks_with_different_clocks_choose_by_the_times_of_rank_0(tiny):
    class OtherRank(World):
        def broadcast(self, value):
            return (3.0, 7.0) if isinstance(value, tuple) else value

    config = tiny()
    created = trainer.Trainer(config, load_dataset(config), torch.device("cpu"), world=OtherRank())
    assert budget.measure_speed(created) == (3.0, 7.0)


def test_a_run_that_is_compiled_has_the_steps_that_compiled_code_can_do(tiny, monkeypatch):
    def create_trainer(config):
        mode = "off" if config.max_iters < 200 else "inductor"
        return SimpleNamespace(config=config, compile_result=SimpleNamespace(mode=mode))

    def measure(created, **_):
        return (0.2 if created.compile_result.mode == "off" else 0.1), 0.0

    monkeypatch.setattr(budget, "measure_speed", measure)
    for minutes, steps in ((0.5, 150), (1, 600)):
        config = tiny(max_iters=None, max_minutes=minutes)
        settled, source = budget.settle_length(config, None, 0, create_trainer)
        assert (settled.max_iters, settled.max_minutes, source) == (steps, None, "max_minutes")


def test_a_size_that_runs_out_of_memory_is_not_chosen(tiny, quiet, small_sizes, monkeypatch):
    def measure(candidate, **kwargs):
        if candidate.config.n_embd == small_sizes[1].n_embd:
            raise torch.OutOfMemoryError("out of memory")
        return 1e-3, 1e-3

    monkeypatch.setattr(budget, "measure_speed", measure)
    config = tiny(max_iters=None, max_minutes=0.001, size="auto")
    assert trainer.prepare_trainer(config).config.n_embd == small_sizes[0].n_embd
