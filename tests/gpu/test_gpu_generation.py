"""Generation and evaluation on CUDA: the tokens and losses of a CPU.

python -m pytest -m gpu tests/gpu/test_gpu_generation.py
"""

import json

import numpy as np
import pytest
import torch

import decode_torch
import evaluate
import inference
from engine import SamplingParams
from generate import generate_tokens, stream_tokens
from model import LanguageModel
from parameters import ModelConfig
from utils.output import run_command

pytestmark = pytest.mark.gpu

GREEDY = SamplingParams(temperature=0)
LENGTH = 150  # more than two contexts
PROMPT = list(range(10))


def create_model(architecture: str, device: str) -> LanguageModel:
    """Create a model with large weights, whose tokens differ clearly in probability."""
    shape = {"n_embd": 64, "n_head": 2, "n_layer": 1, "block_size": 64}
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(architecture=architecture, **shape), 65).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(device)


@pytest.mark.parametrize("architecture", ["modern", "gpt2", "speedrun"])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(0.9, top_k=20, top_p=0.9)])
def test_generation_gives_the_tokens_of_a_cpu(device, architecture, sampling):
    texts = [
        generate_tokens(create_model(architecture, each), PROMPT, LENGTH, sampling, seeds=[1, 2])
        for each in ("cpu", device)
    ]
    assert texts[0].tolist() == texts[1].tolist()


@pytest.mark.parametrize("architecture", ["modern", "gpt2", "speedrun"])
@pytest.mark.parametrize(
    "sampling", [GREEDY, SamplingParams(1.3, 0.9, top_k=20, top_p=0.9, min_p=0.01)]
)
def test_a_cuda_graph_generates_the_tokens_of_plain_steps(
    device, architecture, sampling, monkeypatch
):
    model = create_model(architecture, device)
    seeds = [1, 2, 3]
    pairs = list(stream_tokens(model, PROMPT, LENGTH, sampling, seeds=seeds))
    graph = [np.concatenate(parts, axis=1) for parts in zip(*pairs, strict=True)]
    assert len(pairs) < LENGTH / 2  # several tokens a call
    monkeypatch.setattr(decode_torch, "GraphDecoder", decode_torch.TorchDecoder)
    pairs = list(stream_tokens(model, PROMPT, LENGTH, sampling, seeds=seeds))
    plain = [np.concatenate(parts, axis=1) for parts in zip(*pairs, strict=True)]
    assert graph[0].tolist() == plain[0].tolist()
    assert np.array_equal(graph[1], plain[1])


def test_a_decoder_that_goes_on_after_a_new_window_keeps_its_graph(device, monkeypatch):
    recorded = []
    record = decode_torch.GraphDecoder._record

    def count_and_record(decoder, *arguments):
        recorded.append(decoder)
        return record(decoder, *arguments)

    monkeypatch.setattr(decode_torch.GraphDecoder, "_record", count_and_record)
    model = create_model("modern", device)
    by_graph = generate_tokens(model, PROMPT, 3 * LENGTH, GREEDY)
    assert len(recorded) == 1
    monkeypatch.setattr(decode_torch, "GraphDecoder", decode_torch.TorchDecoder)
    assert by_graph.tolist() == generate_tokens(model, PROMPT, 3 * LENGTH, GREEDY).tolist()


# Commands -------------------------------------------------------------------------------------


@pytest.fixture
def on_both(run, device, capsys):
    """Return a function that runs a command for one trained model on CPU and device."""
    trained = str(run(device="cpu", max_iters=8).run_dir)

    def call(main, *flags: str) -> list[dict]:
        printed = []
        for each in ("cpu", device, device):
            assert run_command(main, [trained, f"--device={each}", "--json", *flags]) == 0
            printed.append(json.loads(capsys.readouterr().out))
        return printed

    call.trained = trained
    return call


@pytest.mark.parametrize("stride", [[], ["--stride=100"]])
def test_evaluate_measures_the_loss_of_a_cpu(on_both, stride):
    on_cpu, on_gpu, again = on_both(evaluate.main, *stride)
    assert on_gpu["loss"] == pytest.approx(on_cpu["loss"], abs=1e-5)
    assert (again["loss"], on_gpu["tokens"]) == (on_gpu["loss"], on_cpu["tokens"])


@pytest.mark.parametrize("flags", [["--temperature=0"], ["--num-samples=3"]])
def test_inference_prints_the_text_of_a_cpu_each_time(on_both, flags):
    more = ["--prompt=To be", "--max-new-tokens=300"]
    on_cpu, on_gpu, again = on_both(inference.main, *more, *flags)
    assert on_gpu["text"] == on_cpu["text"]
    assert on_gpu["log_probs"] == pytest.approx(on_cpu["log_probs"], abs=1e-3)
    assert (again["text"], again["log_probs"]) == (on_gpu["text"], on_gpu["log_probs"])


@pytest.mark.parametrize(
    ("main", "key", "flags"),
    [(inference.main, "text", ["--engine=torch", "--temperature=0"]), (evaluate.main, "loss", [])],
)
def test_int8_gives_the_results_of_a_cpu(on_both, main, key, flags):
    on_cpu, on_gpu, _ = on_both(main, "--quantize=int8", *flags)
    assert on_gpu["quantize"] == "int8"
    assert on_gpu[key] == (on_cpu[key] if key == "text" else pytest.approx(on_cpu[key], abs=1e-4))


def test_engine_numba_on_a_gpu_is_an_error_and_auto_takes_torch(on_both, device, capsys):
    words = [on_both.trained, f"--device={device}", "--engine=numba"]
    assert run_command(inference.main, words) == 2
    assert device in capsys.readouterr().err
    assert on_both(inference.main)[1]["engine"] == "torch"
