"""ONNX exports in ONNX Runtime: the same logits and texts, with a cache and without.

python -m pytest tests/test_export_onnx.py -m slow
"""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import CHECKOUT, save_random_model
from test_export import SHAPE, TEXT, VARIANTS, run_export

from exporters.onnx import list_cache_names, open_export
from exporters.source import load_source
from exporters.verify import compare_with_source
from tokenizer import CharTokenizer

pytestmark = pytest.mark.slow  # PyTorch's exporter takes 10 to 20 seconds


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request, tmp_path_factory):
    """A source and its export, for each variant."""
    place = tmp_path_factory.mktemp("exported")
    tokenizer = CharTokenizer(sorted(set(TEXT)))
    save_random_model(place / "model", tokenizer, **{**SHAPE, **VARIANTS[request.param]})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return load_source(place / "model"), run_export(place / "model", "--format=onnx")


def test_onnx_runtime_computes_the_same_logits_and_greedy_text(exported):
    source, directory = exported
    found = compare_with_source(source, open_export(directory))
    assert found.difference <= 1e-4
    assert (found.agreeing, found.is_text_same) == (found.generated, True)


def test_greedy_text_without_a_cache_is_that_with_a_cache(exported):
    target = open_export(exported[1])
    ids = np.array([1, 2, 3])
    with_cache = target.generate(ids, 60)
    for token in with_cache:
        assert target.compute_logits(ids)[-1].argmax() == token
        ids = np.append(ids, token)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("T", [1, 2, 17, SHAPE["block_size"]])
def test_a_batch_of_any_size_and_length_gives_the_logits_of_pytorch(exported, B, T):
    source, directory = exported
    ids = np.random.default_rng(0).integers(0, len(set(TEXT)), (B, T))
    with torch.no_grad():
        expected = source.model(torch.tensor(ids))[0].numpy()
    session = onnxruntime.InferenceSession(directory / "model.onnx")
    (logits,) = session.run(["logits"], {"input_ids": ids})
    assert np.abs(logits - expected).max() <= 1e-4


def test_a_prompt_may_be_prefilled_in_parts(exported):
    source, directory = exported
    config, ids = source.config, np.random.default_rng(1).integers(0, len(set(TEXT)), (2, 50))
    session = onnxruntime.InferenceSession(directory / "decoder.onnx")
    names = list_cache_names("past", config.n_layer)
    empty = np.zeros((2, config.n_head, 0, config.n_embd // config.n_head), dtype=np.float32)
    cache = [empty] * len(names)
    padded = np.pad(ids, ((0, 0), (3, 0)), constant_values=-1)
    for start, stop in ((0, 20), (20, 21), (21, 50)):
        inputs = {"input_ids": ids[:, start:stop], **dict(zip(names, cache, strict=True))}
        if config.architecture == "speedrun":
            inputs["previous_ids"] = padded[:, start : start + 3]
        logits, *cache = session.run(None, inputs)
    with torch.no_grad():
        expected = source.model(torch.tensor(ids))[0][:, -1].numpy()
    assert np.abs(logits - expected).max() <= 1e-4
    assert cache[0].shape[2] == 50


def test_the_models_are_valid_and_their_metadata_has_vocabulary_and_settings(exported):
    source, directory = exported
    for name in ("model.onnx", "decoder.onnx"):
        graph = onnx.load(directory / name)
        onnx.checker.check_model(graph, full_check=True)
        metadata = {each.key: each.value for each in graph.metadata_props}
        assert json.loads(metadata["vocabulary"]) == source.tokenizer.chars
        assert json.loads(metadata["settings"])["block_size"] == SHAPE["block_size"]
        assert metadata["folio.weights_sha256"] == source.weights_sha256


def test_no_graph_has_a_path_or_a_stack_trace(exported):
    for path in exported[1].glob("*.onnx"):
        content = path.read_bytes()
        assert b"stack_trace" not in content and b".py" not in content
        assert str(CHECKOUT).encode() not in content
