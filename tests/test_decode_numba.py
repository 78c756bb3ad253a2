"""decode_numba.py and decode_loops.py: plain loops generate the tokens of PyTorch.

python -m pytest tests/test_decode_numba.py
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import decode_numba
from decode_numba import NumbaEngine, ThreadChooser, count_cores, read_weights
from decode_torch import TorchEngine, sample_token
from engine import SamplingParams
from generate import generate_tokens, iter_uniforms, stream_tokens
from model import LanguageModel
from parameters import ModelConfig
from tokenizer import GPT2Tokenizer
from utils.quantization import round_to_int8

V, NUM_TOKENS = 40, 37  # ids from 37 on are padding
GREEDY = SamplingParams(temperature=0)
SAMPLINGS = {
    "greedy": GREEDY,
    "temperature": SamplingParams(temperature=0.9),
    "nearly greedy": SamplingParams(temperature=1e-30),
    "hot": SamplingParams(temperature=1e300),
    "top_k": SamplingParams(top_k=5),
    "top_k of 1": SamplingParams(top_k=1),
    "top_k of more than there are": SamplingParams(top_k=1000),
    "top_p": SamplingParams(top_p=0.7),
    "tiny top_p": SamplingParams(top_p=1e-9),
    "min_p": SamplingParams(min_p=0.1),
    "penalty": SamplingParams(repetition_penalty=1.3, temperature=0),
    "reward": SamplingParams(repetition_penalty=0.7),
    "all": SamplingParams(1.2, temperature=1.5, top_k=9, top_p=0.9, min_p=0.02),
}
SHAPES = {
    "modern": {},
    "gpt2": {"architecture": "gpt2"},
    "modern, gelu, tied": {"activation": "gelu", "tie_weights": True},
    "modern, gelu_tanh": {"activation": "gelu_tanh"},
    "gpt2, no bias, untied": {"architecture": "gpt2", "bias": False, "tie_weights": False},
    "gpt2, silu": {"architecture": "gpt2", "activation": "silu"},
    "gpt2, gelu_tanh": {"architecture": "gpt2", "activation": "gelu_tanh"},
    "one head": {"n_head": 1},
    "odd head size": {"architecture": "gpt2", "n_embd": 35, "n_head": 5},
    "another theta": {"rope_theta": 500.0},
    "speedrun": {"architecture": "speedrun", "ngram_rows": 50},
}


def create_model(**changes) -> LanguageModel:
    """Create a model whose text does not repeat itself: no weight is 0, no norm is the identity."""
    torch.manual_seed(0)
    settings = {"n_embd": 32, "n_head": 2, "n_layer": 2, "block_size": 24, **changes}
    model = LanguageModel(ModelConfig(**settings), V, NUM_TOKENS)
    model.config = ModelConfig(**settings)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.eval()


def create_engine(model: LanguageModel, **options) -> NumbaEngine:
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    sizes = (model.vocab_size, model.num_tokens)
    return NumbaEngine(read_weights(tensors, model.config, *sizes, **options), model.config)


def assert_same_text(model, engine, prompt, length, sampling, seeds=(3,)) -> np.ndarray:
    """Assert that both engines generate the same tokens, with nearly the same probabilities."""
    results = []
    for each in (model, engine):
        parts = list(stream_tokens(each, prompt, length, sampling, seeds=seeds))
        results.append([np.concatenate(part, axis=1) for part in zip(*parts, strict=True)])
    (expected, expected_log_probs), (tokens, log_probs) = results
    assert tokens.tolist() == expected.tolist()
    np.testing.assert_allclose(log_probs, expected_log_probs, atol=1e-4, rtol=1e-4)
    assert tokens.max() < NUM_TOKENS
    return tokens


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_generates_the_tokens_of_pytorch_through_many_windows(shape):
    model = create_model(**SHAPES[shape])
    engine = create_engine(model)
    assert_same_text(model, engine, [1, 2, 3], 60, GREEDY)
    tokens = assert_same_text(model, engine, [1, 2, 3], 150, SAMPLINGS["temperature"])
    assert len(np.unique(tokens)) > 10


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_way_of_sampling_generates_the_tokens_of_pytorch(sampling):
    model = create_model()
    assert_same_text(model, create_engine(model), [1, 2, 3], 150, SAMPLINGS[sampling])


@pytest.mark.parametrize("given", [1, 2, 23, 24, 25, 60])
def test_every_length_of_the_prompt_generates_the_tokens_of_pytorch(given):
    model = create_model(architecture="gpt2")
    prompt = np.arange(given) % NUM_TOKENS
    assert_same_text(model, create_engine(model), prompt, 40, SAMPLINGS["temperature"])


@pytest.mark.parametrize("block_size", [1, 2, 5, 300])
def test_every_context_generates_the_tokens_of_pytorch(block_size):
    """A prompt of more than CHUNK tokens is read in parts."""
    model = create_model(block_size=block_size)
    prompt = np.arange(290) % NUM_TOKENS
    assert_same_text(model, create_engine(model), prompt, 50, SAMPLINGS["all"])


def test_texts_that_meet_in_one_token_stay_different():
    """Equal prompts share one prefill; equal tokens later do not make texts equal."""
    model = create_model()
    prompts = np.array([[1, 2, 3], [4, 5, 6]])
    engine, results = create_engine(model), []
    for each in (TorchEngine(model), engine):
        decoder = each.create_decoder(prompts, GREEDY)
        decoder.decode(prompts, 0, np.zeros((1, 2), dtype=np.float32))
        same = np.array([[7], [7]])
        results.append(decoder.decode(same, 3, np.zeros((5, 2), dtype=np.float32))[1])
    np.testing.assert_allclose(results[1], results[0], atol=1e-4)
    assert not np.allclose(results[0][0], results[0][1])


@pytest.mark.parametrize("rows", [2, 3, 4, 7, 64])
def test_texts_side_by_side_are_those_of_pytorch(rows):
    model = create_model()
    engine, seeds = create_engine(model), range(rows)
    assert_same_text(model, engine, [1, 2, 3], 60, SAMPLINGS["all"], seeds)
    prompts = np.arange(5 * rows).reshape(rows, 5) % NUM_TOKENS  # a prompt for each
    assert_same_text(model, engine, prompts, 60, SAMPLINGS["all"], seeds)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(top_k=50, top_p=0.9)])
def test_the_vocabulary_of_gpt2_generates_the_tokens_of_pytorch(sampling):
    torch.manual_seed(0)
    config = ModelConfig(n_embd=32, n_head=2, n_layer=1, block_size=16)
    model = LanguageModel(config, GPT2Tokenizer.vocab_size, GPT2Tokenizer.num_tokens).eval()
    model.config = config
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    prompt = [50_256, 0, 50_300]  # the last is padding, which is never generated
    parts = [generate_tokens(each, prompt, 20, sampling) for each in (model, create_engine(model))]
    assert np.array_equal(*parts)
    assert parts[0][:, 3:].max() < GPT2Tokenizer.num_tokens


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["greedy", "temperature", "all"])
@pytest.mark.parametrize("architecture", ["modern", "gpt2"])
def test_2_000_tokens_of_the_default_shape_are_those_of_pytorch(architecture, sampling):
    """Up to a draw, if there is one, within the rounding of a boundary between two tokens."""
    shape = {"n_layer": 3, "n_head": 4, "n_embd": 128, "block_size": 256}
    model, sampling = create_model(architecture=architecture, **shape), SAMPLINGS[sampling]
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.15)
        else:
            nn.init.normal_(parameter, mean=1, std=0.1)
    prompt = [1, 2, 3]
    expected, tokens = (
        generate_tokens(each, prompt, 2000, sampling, seeds=[3])[0].tolist()
        for each in (model, create_engine(model))
    )
    assert len(set(expected)) > 10
    if tokens != expected:
        assert sampling.temperature > 0
        end = next(
            i for i, pair in enumerate(zip(tokens, expected, strict=True)) if len({*pair}) > 1
        )
        draw = next(itertools.islice(iter_uniforms([3]), end - len(prompt), None))
        near = sample_near(model, expected[:end], sampling, torch.from_numpy(draw))
        assert {tokens[end], expected[end]} <= near


@torch.no_grad()
def sample_near(model, ids, sampling, draw) -> set[int]:
    """Return the tokens that PyTorch samples after `ids` for draws that differ by 1e-5."""
    T, length = model.block_size, len(ids)
    if length > T:  # the window rule of `stream_tokens`
        length = T - T // 2 + (length - T - 1) % (T // 2 + 1)
    logits = model(torch.tensor([ids[-length:]]))[0][:, -1, :NUM_TOKENS]
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[0, ids] = True
    seen = seen if sampling.repetition_penalty != 1 else None
    offsets = (-1e-5, 0, 1e-5)
    return {sample_token(logits, draw + each, sampling, seen)[0].item() for each in offsets}


def test_texts_do_not_depend_on_the_number_of_threads(monkeypatch):
    """Not by a single bit: 5 heads and 44 channels give threads unequal shares."""
    model = create_model(n_embd=40, n_head=5)
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(decode_numba, "count_cores", lambda threads=threads: threads)
        monkeypatch.setattr(decode_numba, "WEIGHTS_PER_THREAD", 1)
        engine = create_engine(model)
        assert engine.threads == threads
        parts = stream_tokens(engine, [1, 2, 3], 30, SAMPLINGS["temperature"], seeds=range(5))
        results.append([np.concatenate(part, axis=1) for part in zip(*parts, strict=True)])
    for tokens, log_probs in results[1:]:
        assert np.array_equal(tokens, results[0][0])
        assert np.array_equal(log_probs, results[0][1])


def test_interleaved_streams_of_one_engine_do_not_mix():
    model = create_model()
    engine = create_engine(model)
    expected = [generate_tokens(engine, [first], 50) for first in (1, 2)]
    streams = [stream_tokens(engine, [first], 50) for first in (1, 2)]
    pairs = itertools.zip_longest(*streams)  # how many tokens come at once depends on the time
    for parts, whole in zip(zip(*pairs, strict=True), expected, strict=True):
        tokens = np.concatenate([part[0] for part in parts if part is not None], axis=1)
        assert np.array_equal(tokens, whole[:, 1:])


def test_the_first_token_comes_alone_and_later_ones_many_at_a_time():
    sizes = [t.shape[1] for t, _ in stream_tokens(create_engine(create_model()), [1], 2000)]
    assert sizes[0] == 1
    assert max(sizes[1:]) > 4


# int8 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["modern", "gpt2"])
@pytest.mark.parametrize("rows", [1, 5])
def test_int8_generates_the_tokens_of_the_rounded_weights(architecture, rows):
    model = create_model(architecture=architecture)
    engine = create_engine(model, int8=True)
    assert engine.weights.up.weight.dtype == np.int8
    round_to_int8(model)
    assert_same_text(model, engine, [1, 2, 3], 100, SAMPLINGS["all"], range(rows))


# Weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda tensors: tensors.pop("final_norm.weight"), "final_norm.weight"),
        (lambda tensors: tensors.pop("blocks.1.mlp.gate.weight"), "blocks.1.mlp.gate.weight"),
        (
            lambda tensors: tensors.update({"blocks.0.mlp.expand.weight": np.float32(1)}),
            "blocks.0.mlp",
        ),
        (
            lambda tensors: tensors.update({"head.weight": np.zeros((V, 5))}),
            "head.weight",
        ),
        (lambda tensors: tensors.update({"blocks.2.other": np.zeros(3)}), "blocks.2.other"),
    ],
)
def test_weights_that_do_not_fit_are_an_error_that_names_the_tensor(change, name):
    model = create_model()
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    change(tensors)
    with pytest.raises(ValueError, match=name):
        read_weights(tensors, model.config, V, NUM_TOKENS)


def test_biases_are_as_required_as_the_other_weights_and_else_unexpected():
    model = create_model(architecture="gpt2", bias=True)
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    without = model.config.model_copy(update={"bias": False})
    with pytest.raises(ValueError, match="bias: unexpected"):
        read_weights(tensors, without, V, NUM_TOKENS)
    for name in ("final_norm.bias", "blocks.1.attention.qkv.bias", "blocks.0.mlp_norm.bias"):
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        with pytest.raises(ValueError, match=f"{name} is missing"):
            read_weights(rest, model.config, V, NUM_TOKENS)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_weights_in_other_dtypes_are_converted(dtype):
    model = create_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    tensors = {n: tensor.detach().numpy().astype(dtype) for n, tensor in model.state_dict().items()}
    engine = NumbaEngine(read_weights(tensors, model.config, V, NUM_TOKENS), model.config)
    assert_same_text(model, engine, [1], 50, GREEDY)


# Threads --------------------------------------------------------------------------------------


def run_calls(chooser: ThreadChooser, seconds: dict[int, float], number: int) -> list[int]:
    """Let a chooser choose, for calls that take so long; return its choices."""
    choices = []
    for _ in range(number):
        choices.append(chooser.choose_or_try())
        chooser.record(choices[-1], seconds[choices[-1]], 1)
    return choices


def test_the_faster_number_of_threads_is_chosen_and_the_other_tried_again():
    chooser = ThreadChooser(4)
    idle = run_calls(chooser, {4: 0.01, 1: 0.02}, 1000)
    assert idle.count(4) > 950
    assert idle.count(1) > 2
    busy = run_calls(chooser, {4: 0.05, 1: 0.02}, 1000)  # another program takes a core
    assert busy.count(1) > 950
    assert run_calls(chooser, {4: 0.01, 1: 0.02}, 1000).count(4) > 900  # and has ended


def test_one_thread_is_chosen_if_there_is_one_core():
    assert set(run_calls(ThreadChooser(1), {1: 0.5}, 100)) == {1}


@pytest.mark.parametrize(("limit", "threads"), [("1", 1), ("1000000", 8), ("", 8), ("x", 8)])
def test_omp_num_threads_lowers_the_number_of_threads(monkeypatch, limit, threads):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.setattr(decode_numba, "CPU_QUOTA", Path("nowhere"))
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    assert count_cores() == threads


@pytest.mark.parametrize(
    ("content", "threads"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("", 8)]
)
def test_the_share_of_a_container_limits_the_number_of_threads(
    monkeypatch, tmp_path, content, threads
):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(decode_numba, "CPU_QUOTA", tmp_path / "cpu.max")
    (tmp_path / "cpu.max").write_text(content, encoding="ascii")
    assert count_cores() == threads


@pytest.mark.parametrize(("ids", "position"), [([[V]], 0), ([[-1]], 0), ([[1]], 24), ([[1]], -1)])
def test_ids_and_positions_out_of_range_are_an_error_and_read_no_memory(ids, position):
    decoder = create_engine(create_model()).create_decoder(np.array([[1]]), GREEDY)
    with pytest.raises(IndexError):
        decoder.decode(np.array(ids), position, np.zeros((1, 1), dtype=np.float32))


def test_two_python_threads_may_use_one_engine(monkeypatch):
    monkeypatch.setattr(decode_numba, "count_cores", lambda: 3)
    monkeypatch.setattr(decode_numba, "WEIGHTS_PER_THREAD", 1)
    engine = create_engine(create_model())
    expected = generate_tokens(engine, [1], 20)
    with ThreadPoolExecutor(2) as pool:
        texts = [pool.submit(generate_tokens, engine, [1], 20) for _ in range(2)]
        for text in texts:
            assert np.array_equal(text.result(60), expected)


def test_an_interrupted_call_leaves_no_thread_waiting(monkeypatch):
    monkeypatch.setattr(decode_numba, "count_cores", lambda: 2)
    monkeypatch.setattr(decode_numba, "WEIGHTS_PER_THREAD", 1)
    engine = create_engine(create_model())
    decoder = engine.create_decoder(np.array([[1]]), GREEDY)
    loops, draws = engine.loops, np.zeros((3, 1), dtype=np.float32)

    def interrupt(*arguments):
        if arguments[-1].rank == 0:
            raise KeyboardInterrupt
        return loops(*arguments)

    engine.loops = interrupt
    with pytest.raises(KeyboardInterrupt):
        decoder.decode(np.array([[1]]), 0, draws)
    assert engine.pool.submit(int).result(60) == 0, "the other thread has ended its call"
    engine.loops = loops
    assert np.array_equal(generate_tokens(engine, [1], 5), generate_tokens(engine, [1], 5))


def test_a_small_model_has_one_thread(monkeypatch):
    monkeypatch.setattr(decode_numba, "count_cores", lambda: 8)
    assert create_engine(create_model()).threads == 1


# Filters --------------------------------------------------------------------------------------


def test_filters_keep_the_tokens_of_pytorch_also_where_logits_are_equal():
    """With a head of few distinct rows many logits are equal, and ties must be cut alike.

    Each row selects one channel, as equal rows of many numbers may differ in rounding: PyTorch's
    kernels add the last rows in another order, on some processors.
    """
    model = create_model(tie_weights=False)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[torch.arange(V), torch.arange(V) % 3] = 4
    engine = create_engine(model)
    for k, p in itertools.product((1, 2, 13, 20, 36), (0.1, 0.5, 0.95)):
        assert_same_text(model, engine, [1], 24, SamplingParams(top_k=k, top_p=p))


def test_an_engine_is_passed_through_and_a_model_becomes_pytorchs():
    from generate import get_engine

    model = create_model()
    engine = create_engine(model)
    assert get_engine(engine) is engine
    assert isinstance(get_engine(model), TorchEngine)
