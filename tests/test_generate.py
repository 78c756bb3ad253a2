"""generate.py and decode_torch.py: sampling, the KV cache, streaming.

python -m pytest tests/test_generate.py
"""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from decode_torch import (
    KVCache,
    apply_repetition_penalty,
    apply_temperature,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    invert_cdf,
    sample_token,
)
from engine import SamplingParams
from generate import UNIFORMS_PER_SEED, generate_tokens, iter_uniforms, stream_tokens
from model import LanguageModel
from parameters import ModelConfig
from utils.errors import UserError

V = 11
LOGITS = torch.tensor([0.5, 0.05, 0.25, 0.2]).log()[None]  # of these probabilities


def get_kept(logits: torch.Tensor) -> list[int]:
    return torch.nonzero(logits[0] > -math.inf).flatten().tolist()


def measure_frequencies(sampling: SamplingParams, number: int = 20_000) -> torch.Tensor:
    """Return each token's share of many samples, `(V,)`."""
    chance = torch.rand(number, generator=torch.Generator().manual_seed(0))
    tokens, _ = sample_token(LOGITS.expand(number, -1), chance, sampling)
    return torch.bincount(tokens.flatten(), minlength=4) / number


def test_samples_follow_the_softmax():
    torch.testing.assert_close(
        measure_frequencies(SamplingParams()), LOGITS[0].exp(), atol=0.02, rtol=0
    )
    cold = (LOGITS[0] / 0.5).softmax(-1)
    torch.testing.assert_close(
        measure_frequencies(SamplingParams(temperature=0.5)), cold, atol=0.02, rtol=0
    )


def test_temperature_0_is_greedy_for_any_draw():
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
def test_top_k_keeps_the_k_most_likely_and_a_k_above_the_vocabulary_keeps_all(k, expected):
    assert get_kept(filter_top_k(LOGITS, k)) == (expected or [0, 1, 2, 3])


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
def test_top_p_keeps_the_fewest_tokens_of_that_total_probability(p, expected):
    assert get_kept(filter_top_p(LOGITS, p)) == expected


@pytest.mark.parametrize(
    ("p", "expected"), [(1, [0]), (0.45, [0, 2]), (0.3, [0, 2, 3]), (0.01, [0, 1, 2, 3])]
)
def test_min_p_keeps_tokens_of_that_share_of_the_highest_probability(p, expected):
    assert get_kept(filter_min_p(LOGITS, p)) == expected


def test_a_filter_treats_each_row_by_itself():
    rows = torch.stack([LOGITS[0], LOGITS[0].flip(0)])
    for each in (lambda x: filter_top_k(x, 2), lambda x: filter_top_p(x, 0.6), apply_temperature):
        logits = each(rows, 0.7) if each is apply_temperature else each(rows)
        torch.testing.assert_close(logits[0], logits[1].flip(0))


def test_a_repetition_penalty_makes_seen_tokens_less_likely_for_logits_of_any_sign():
    logits, seen = torch.tensor([[2.0, -2.0, 1.0]]), torch.tensor([[True, True, False]])
    assert apply_repetition_penalty(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0]]


def test_filters_follow_the_temperature_and_keep_what_all_of_them_keep():
    hot = SamplingParams(temperature=100, min_p=0.5)  # the probabilities are almost equal then
    assert (measure_frequencies(hot) > 0).all()
    both = SamplingParams(top_k=3, top_p=0.74)
    assert torch.nonzero(measure_frequencies(both)).flatten().tolist() == [0, 2]


def test_the_log_probability_is_the_models_before_temperature_and_filters():
    _, log_prob = sample_token(
        LOGITS, torch.tensor([0.0]), SamplingParams(temperature=0.1, top_k=1)
    )
    assert log_prob.item() == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("draw", [0.0, 0.3, 0.999, 1 - 2**-24])
def test_a_token_of_probability_0_is_never_sampled(draw):
    probabilities = torch.tensor([[0.0, 0.0, 0.6, 0.0, 0.4, 0.0, 0.0]])
    assert invert_cdf(probabilities, torch.tensor([draw])).item() == (2 if draw < 0.6 else 4)


def draw_uniforms(seeds, count: int) -> torch.Tensor:
    return torch.from_numpy(np.stack(list(itertools.islice(iter_uniforms(seeds), count))))


def test_a_seeds_draws_do_not_depend_on_the_other_seeds():
    count = 2 * UNIFORMS_PER_SEED
    numbers, pairs = draw_uniforms([7], count), draw_uniforms([6, 7], count)
    assert torch.equal(numbers[:, 0], pairs[:, 1])
    assert not torch.equal(pairs[:, 0], pairs[:, 1])
    assert 0 <= numbers.min() < numbers.max() < 1
    assert numbers.unique().numel() > count // 2  # the second half is not the first again


@pytest.mark.parametrize("seed", [0, 1337, 2**32 + 5, 2**63 - 1])
def test_the_draws_are_those_of_a_torch_generator(seed):
    expected = torch.rand(2000, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(draw_uniforms([seed], 2000)[:, 0], expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.1, "min_p": 1},
        {"repetition_penalty": 0},
    ],
)
def test_sampling_parameters_out_of_range_are_an_error_that_names_all(wrong):
    with pytest.raises(UserError, match=".*".join(wrong)):
        SamplingParams(**wrong)


def test_top_p_keeps_the_first_of_equally_likely_tokens():
    logits = torch.zeros(1, 100)
    assert get_kept(filter_top_p(logits, 0.035)) == [0, 1, 2, 3]


def test_rounding_never_carries_a_draw_past_the_last_token():
    probabilities = torch.tensor([[1.0, 1e-8, 0.0]]) / 3  # they need not sum to 1
    assert invert_cdf(probabilities, torch.tensor([1.0])).item() <= 1


# KV cache and streaming -----------------------------------------------------------------------


def make(seed: int = 0, num_tokens: int | None = None, **changes) -> LanguageModel:
    """Create a small model with random weights, none of them 0 or 1."""
    settings = {"n_embd": 12, "n_head": 3, "n_layer": 2, "block_size": 8}
    torch.manual_seed(seed)
    model = LanguageModel(ModelConfig(**{**settings, **changes}), V, num_tokens)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def tokens(B: int = 2, T: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def generate_without_cache(model, prompt, length, sampling, seed=0) -> list[int]:
    """Follow the rule of `stream_tokens` without a cache: run the whole window for each token."""
    ids, T = list(prompt), model.block_size
    window = ids[-T:]
    for draw in draw_uniforms([seed], length):
        if len(window) > T:
            window = window[-(T - T // 2) :]
        logits = model.eval()(torch.tensor([window]))[0][:, -1, : model.num_tokens]
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, ids] = True
        is_penalized = sampling.repetition_penalty != 1
        token, _ = sample_token(logits, draw, sampling, seen if is_penalized else None)
        ids.append(token.item())
        window.append(token.item())
    return ids


SAMPLINGS = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(repetition_penalty=1.3, temperature=0.8, top_k=5, top_p=0.9, min_p=0.05),
]


@torch.no_grad()
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("given", [1, 3, 8, 12])
@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_generation_is_the_same_with_and_without_a_cache_within_block_size_and_beyond(
    architecture, given, sampling
):
    model = make(architecture=architecture, num_tokens=V - 1)
    prompt = tokens(1, given)[0].tolist()
    expected = generate_without_cache(model, prompt, 30, sampling, seed=3)
    out = generate_tokens(model, prompt, 30, sampling, seeds=[3])
    assert out[0].tolist() == expected
    assert len(set(expected)) > 2 or sampling.temperature == 0


@torch.no_grad()
@pytest.mark.parametrize("block_size", [1, 2, 7])
def test_the_window_rule_holds_at_any_block_size(block_size):
    model = make(block_size=block_size)
    sampling = SamplingParams(temperature=2)
    assert generate_tokens(model, [1, 2], 20, sampling)[0].tolist() == generate_without_cache(
        model, [1, 2], 20, sampling
    )


def test_cache_entries_beyond_the_last_position_are_masked():
    model, idx = make().eval(), tokens(1, 4)
    clean, used = KVCache(model, 1), KVCache(model, 1)
    for tensor in (*used.keys, *used.values):
        tensor.fill_(1e3)
    with torch.no_grad():
        expected = model.compute_next_logits(idx, clean.positions[:4], clean)
        assert torch.equal(model.compute_next_logits(idx, used.positions[:4], used), expected)
        torch.testing.assert_close(expected, model(idx)[0][:, -1])


@torch.no_grad()
def test_the_window_rule_holds_in_a_long_text():
    model, sampling = make(block_size=4, n_layer=1), SamplingParams(temperature=2)
    length = UNIFORMS_PER_SEED + 50  # draws come in batches
    out = generate_tokens(model, [1], length, sampling, seeds=[7])
    assert out[0].tolist() == generate_without_cache(model, [1], length, sampling, seed=7)


@torch.no_grad()
def test_a_repetition_penalty_includes_the_prompt_before_the_window():
    model, sampling = make(), SamplingParams(repetition_penalty=100)
    texts = set()
    for first in range(V):
        prompt = [first, *[1] * 9]  # 10 tokens, of which the model sees 8
        out = generate_tokens(model, prompt, 10, sampling, seeds=[2])[0].tolist()
        assert out == generate_without_cache(model, prompt, 10, sampling, seed=2)
        texts.add(tuple(out[1:]))
    assert len(texts) > 2


def test_an_empty_prompt_is_an_error():
    with pytest.raises(UserError, match="prompt"):
        generate_tokens(make(), [], 3)


def test_a_decoded_token_runs_one_position_through_the_model():
    model = make(block_size=64).eval()
    lengths = []
    model.blocks[0].register_forward_hook(lambda module, args, out: lengths.append(out.size(1)))
    generate_tokens(model, [1, 2, 3], 100)
    # The prompt, one by one until 64 are full, then the newer half again.
    assert lengths == [3] + [1] * 61 + [32] + [1] * 32 + [32] + [1] * 4


def test_generation_returns_the_prompt_and_max_new_tokens_more():
    prompt = tokens(3, 4)
    out = generate_tokens(make(), prompt, 20, seeds=[1, 2, 3])
    assert out.shape == (3, 24)
    assert np.array_equal(out[:, :4], prompt)
    assert np.array_equal(generate_tokens(make(), prompt, 0, seeds=[1, 2, 3]), prompt)


@pytest.mark.parametrize(
    "prompt",
    [[1, 2], np.array([1, 2], np.uint8), np.array([1, 2], np.uint16), torch.tensor([1, 2])],
)
def test_a_prompt_may_be_a_list_an_array_or_a_tensor(prompt):
    assert generate_tokens(make(), prompt, 1)[0, :2].tolist() == [1, 2]


def test_a_sample_depends_neither_on_the_other_samples_nor_on_max_new_tokens():
    model, prompt = make(), [1, 2, 3]
    together = generate_tokens(model, prompt, 40, seeds=[5, 6, 7])
    for row, seed in enumerate((5, 6, 7)):
        assert np.array_equal(generate_tokens(model, prompt, 40, seeds=[seed])[0], together[row])
        fewer = generate_tokens(model, prompt, 11, seeds=[seed])[0]
        assert np.array_equal(fewer, together[row, :14])
    assert len({tuple(row) for row in together.tolist()}) == 3


def test_generation_leaves_the_global_rng_state_and_the_models_mode_unchanged():
    model = make(dropout=0.3)
    state = torch.get_rng_state()
    first = generate_tokens(model, [1], 10, seeds=[4])
    assert np.array_equal(first, generate_tokens(model, [1], 10, seeds=[4]))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for _ in stream_tokens(model, [1], 10):
        break  # an abandoned stream restores the mode too
    assert model.training


def test_a_stream_yields_the_tokens_of_generation_one_by_one_with_their_log_probabilities():
    model, prompt = make().eval(), [1, 2, 3]
    parts = list(stream_tokens(model, prompt, 5, SamplingParams(temperature=0.5), seeds=[1, 2]))
    assert [tuple(ids.shape) for ids, _ in parts] == [(2, 1)] * 5
    out = torch.tensor(
        generate_tokens(model, prompt, 5, SamplingParams(temperature=0.5), seeds=[1, 2])
    )
    assert np.array_equal(np.concatenate([ids for ids, _ in parts], axis=1), out[:, 3:])
    log_probs = model(out[:, :-1])[0].log_softmax(-1)[:, 2:]  # before the temperature
    expected = log_probs.gather(-1, out[:, 3:, None])[..., 0]
    log_probs = np.concatenate([each for _, each in parts], axis=1)
    torch.testing.assert_close(torch.from_numpy(log_probs), expected)
