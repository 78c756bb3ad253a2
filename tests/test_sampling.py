"""sampling.py: how the next token is chosen.

python -m pytest tests/test_sampling.py
"""

import math
import re

import pytest
import torch

from sampling import (
    SamplingParams,
    apply_repetition_penalty,
    apply_temperature,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    invert_cdf,
    iter_uniforms,
    sample_token,
)
from utils.errors import UserError

LOGITS = torch.tensor([0.5, 0.05, 0.25, 0.2]).log()[None]  # of these probabilities


def kept(logits: torch.Tensor) -> list[int]:
    return torch.nonzero(logits[0] > -math.inf).flatten().tolist()


def drawn(sampling: SamplingParams, number: int = 20_000) -> torch.Tensor:
    """The share that each token has of many draws."""
    chance = torch.rand(number, generator=torch.Generator().manual_seed(0))
    tokens, _ = sample_token(LOGITS.expand(number, -1), chance, sampling)
    return torch.bincount(tokens.flatten(), minlength=4) / number


def test_draws_follow_the_softmax():
    torch.testing.assert_close(drawn(SamplingParams()), LOGITS[0].exp(), atol=0.02, rtol=0)
    cold = (LOGITS[0] / 0.5).softmax(-1)
    torch.testing.assert_close(drawn(SamplingParams(temperature=0.5)), cold, atol=0.02, rtol=0)


def test_temperature_0_is_greedy_whatever_is_drawn():
    for draw in (0.0, 0.5, 0.999):
        token, _ = sample_token(LOGITS, torch.tensor([draw]), SamplingParams(temperature=0))
        assert token.item() == 0


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-30, 1e-8, 1e8])
def test_no_temperature_breaks_sampling(temperature):
    logits = torch.tensor([[-50.0, 80.0, 3.0]])
    token, log_prob = sample_token(
        logits, torch.tensor([0.5]), SamplingParams(temperature=temperature)
    )
    assert token.shape == (1, 1)
    assert torch.isfinite(log_prob).all()
    assert token.item() == 1 or temperature > 1


@pytest.mark.parametrize(("k", "expected"), [(1, [0]), (2, [0, 2]), (4, [0, 1, 2, 3]), (99, None)])
def test_top_k_keeps_the_k_likeliest_and_more_than_the_vocabulary_is_all(k, expected):
    assert kept(filter_top_k(LOGITS, k)) == (expected or [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (1e-46, [0]),
        (1e-9, [0]),
        (0.5, [0]),
        (0.49, [0]),
        (0.51, [0, 2]),
        (0.9, [0, 2, 3]),
        (0.97, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_fewest_that_have_that_share_together(p, expected):
    assert kept(filter_top_p(LOGITS, p)) == expected


@pytest.mark.parametrize(
    ("p", "expected"), [(1, [0]), (0.45, [0, 2]), (0.3, [0, 2, 3]), (0.01, [0, 1, 2, 3])]
)
def test_min_p_keeps_what_has_that_share_of_the_likeliest(p, expected):
    assert kept(filter_min_p(LOGITS, p)) == expected


def test_a_filter_acts_on_each_row_by_itself():
    rows = torch.stack([LOGITS[0], LOGITS[0].flip(0)])
    for each in (lambda x: filter_top_k(x, 2), lambda x: filter_top_p(x, 0.6), apply_temperature):
        logits = each(rows, 0.7) if each is apply_temperature else each(rows)
        torch.testing.assert_close(logits[0], logits[1].flip(0))


def test_a_repetition_penalty_makes_what_was_seen_less_likely_whatever_its_sign():
    logits, seen = torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[True, True, False]])
    assert apply_repetition_penalty(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0]]


def test_filters_come_after_the_temperature_and_together_keep_what_each_keeps():
    hot = SamplingParams(temperature=100, min_p=0.5)  # all are about as likely then
    assert (drawn(hot) > 0).all()
    both = SamplingParams(top_k=3, top_p=0.74)
    assert torch.nonzero(drawn(both)).flatten().tolist() == [0, 2]


def test_the_log_probability_is_the_models_own_before_anything_was_changed():
    _, log_prob = sample_token(
        LOGITS, torch.tensor([0.0]), SamplingParams(temperature=0.1, top_k=1)
    )
    assert log_prob.item() == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("draw", [0.0, 0.3, 0.999, 1 - 2**-24])
def test_what_has_no_probability_is_never_picked(draw):
    probabilities = torch.tensor([[0.0, 0.0, 0.6, 0.0, 0.4, 0.0, 0.0]])
    assert invert_cdf(probabilities, torch.tensor([draw])).item() == (2 if draw < 0.6 else 4)


def test_a_seed_has_its_own_draws_whatever_its_neighbours():
    alone, among = iter_uniforms([7]), iter_uniforms([6, 7])
    for _ in range(2):
        numbers, pairs = next(alone), next(among)
        assert torch.equal(numbers[:, 0], pairs[:, 1])
        assert not torch.equal(pairs[:, 0], pairs[:, 1])
        assert 0 <= numbers.min() < numbers.max() < 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"temperature": -1}, "a temperature of 0 or more"),
        ({"temperature": math.nan}, "a temperature of 0 or more"),
        ({"top_k": 0}, "a top_k of 1 or more"),
        ({"top_p": 0}, "a top_p above 0, at most 1"),
        ({"top_p": 1.1, "min_p": 1}, "a top_p above 0, at most 1 and a min_p from 0 to below 1"),
        ({"repetition_penalty": 0}, "a repetition_penalty from 0.01 to 100"),
    ],
)
def test_a_way_of_sampling_that_means_nothing_is_refused(wrong, words):
    with pytest.raises(UserError, match=re.escape(words)):
        SamplingParams(**wrong)


def test_of_equally_likely_tokens_the_first_come_first_in_top_p():
    logits = torch.zeros(1, 100)
    assert kept(filter_top_p(logits, 0.035)) == [0, 1, 2, 3]


def test_rounding_never_carries_a_draw_past_the_end():
    probabilities = torch.tensor([[1.0, 1e-8, 0.0]]) / 3  # they need not sum to 1
    assert invert_cdf(probabilities, torch.tensor([1.0])).item() <= 1
