"""model.py: the transformer, its loss, and what it generates.

python -m pytest tests/test_model.py
"""

import math
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model import KVCache, LanguageModel
from parameters import ModelConfig
from sampling import UNIFORMS_PER_BATCH, SamplingParams, iter_uniforms, sample_token
from utils.errors import UserError

V = 11


GPT2 = {"architecture": "gpt2"}


def make(seed: int = 0, num_tokens: int | None = None, **changes) -> LanguageModel:
    settings = {"n_embd": 12, "n_head": 3, "n_layer": 2, "block_size": 8}
    torch.manual_seed(seed)
    return LanguageModel(ModelConfig(**{**settings, **changes}), V, num_tokens)


def awake(model: LanguageModel, std: float = 0.2) -> LanguageModel:
    """With no zeros and no ones left among the weights: each of them matters."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


@pytest.fixture(params=["modern", "gpt2"])
def architecture(request) -> str:
    return request.param


def tokens(B: int = 2, T: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def test_logits_and_loss_have_their_shapes_and_the_loss_is_the_mean_cross_entropy():
    model, idx, targets = make(), tokens(), tokens(seed=2)
    logits, none = model(idx)
    assert logits.shape == (2, 8, V)
    assert none is None
    _, loss = model(idx, targets)
    chosen = logits.log_softmax(-1).gather(-1, targets[..., None])
    assert loss.item() == pytest.approx(-chosen.mean().item(), rel=1e-5)


def test_an_untrained_model_is_about_as_good_as_guessing(architecture):
    _, loss = make(n_embd=48, architecture=architecture)(tokens(64), tokens(64, seed=2))
    assert loss.item() == pytest.approx(math.log(V), abs=0.1)


def test_a_position_sees_itself_and_the_past_and_not_the_future(architecture):
    model, idx = awake(make(architecture=architecture)), tokens(1)
    before = model(idx)[0]
    idx[0, 5] = (idx[0, 5] + 1) % V
    after = model(idx)[0]
    assert torch.equal(before[0, :5], after[0, :5])
    assert not torch.allclose(before[0, 5], after[0, 5])
    assert not torch.allclose(before[0, 7], after[0, 7])


def test_sequences_of_a_batch_do_not_see_each_other(architecture):
    model, idx = awake(make(architecture=architecture)), tokens(3)
    together = model(idx)[0]
    alone = torch.cat([model(row[None])[0] for row in idx])
    torch.testing.assert_close(together, alone)


def test_a_short_sequence_is_legal_and_a_long_one_is_not():
    assert make()(tokens(T=1))[0].shape == (2, 1, V)
    with pytest.raises(AssertionError):
        make()(tokens(T=9))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_bias_and_tying_decide_which_parameters_there_are(tie, bias):
    model = make(tie_weights=tie, bias=bias, **GPT2)
    names = dict(model.named_parameters())
    assert ("head.weight" in names) is not tie
    assert any(name.endswith("bias") for name in names) is bias
    C, L, T = 12, 2, 8
    vectors = (2 * L + 1) * C * (2 if bias else 1) + (L * (3 + 1 + 4 + 1) * C if bias else 0)
    expected = V * C * (1 if tie else 2) + T * C + L * 12 * C * C + vectors
    assert model.count_parameters() == expected


def test_the_weights_start_as_gpt2s_do():
    model = make(n_embd=96, n_layer=4, bias=True, tie_weights=False, **GPT2)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(8) if "projection" in name else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name


@pytest.mark.parametrize("tie", [True, False])
def test_modern_starts_with_branches_that_add_nothing(tie):
    model = make(n_embd=96, n_layer=4, tie_weights=tie)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        elif "projection" in name or name == "head.weight":
            assert not parameter.any(), name
        elif name == "token_embedding.weight":
            assert parameter.std().item() == pytest.approx(0.02 if tie else 0.2, rel=0.1), name
        else:
            assert parameter.std().item() == pytest.approx(0.7 / 96**0.5, rel=0.1), name


def test_modern_has_three_matrices_in_its_mlp_and_no_positions_to_learn():
    C, L, D, hidden = 48, 2, 16, 128
    matrices = V * C * 2 + L * (4 * C * C + 3 * C * hidden)
    vectors = (2 * L + 1) * C + L * 2 * D
    assert make(n_embd=C, n_head=3, n_layer=L).num_parameters() == matrices + vectors


def test_muon_gets_the_matrices_of_the_blocks_and_nothing_else(architecture):
    model = make(architecture=architecture, tie_weights=False)
    names = set(model.get_block_matrices())
    assert names == {n for n, p in model.named_parameters() if "blocks" in n and p.dim() == 2}
    assert len(names) == 2 * (5 if architecture == "modern" else 4)


def test_dropout_acts_in_training_alone(architecture):
    model, idx = awake(make(dropout=0.5, architecture=architecture)), tokens()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])
    same = make(architecture=architecture)
    same.load_state_dict(model.state_dict())
    assert torch.equal(same(idx)[0], model(idx)[0])


def test_every_parameter_learns(architecture):
    bias = architecture == "gpt2"
    model = awake(make(bias=bias, tie_weights=False, architecture=architecture))
    model(tokens(), tokens(seed=2))[1].backward()
    for name, parameter in model.named_parameters():
        # A key's bias adds the same to all scores of a query, which the softmax takes away.
        grad = parameter.grad[24:] if name.endswith("qkv.bias") else parameter.grad
        assert grad.abs().max() > 0, name


@pytest.mark.parametrize("tie", [True, False])
def test_weights_go_through_safetensors(tmp_path, tie, architecture):
    settings = {"tie_weights": tie, "architecture": architecture}
    model, other = awake(make(**settings)), make(seed=5, **settings)
    model.save_safetensors(tmp_path / "m.safetensors", {"step": "3"})
    other.load_safetensors((tmp_path / "m.safetensors").read_bytes())
    assert torch.equal(model(tokens())[0], other(tokens())[0])


# Against GPT-2 --------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_the_logits_are_those_of_transformers_gpt2(activation):
    transformers = pytest.importorskip("transformers")
    B, T, C, H, L = 3, 32, 48, 4, 3
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=V,
            n_positions=T,
            n_embd=C,
            n_head=H,
            n_layer=L,
            activation_function={"gelu": "gelu", "gelu_tanh": "gelu_new"}[activation],
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
    ).eval()
    awake(theirs)
    shape = {"block_size": T, "n_embd": C, "n_head": H, "n_layer": L}
    ours = make(**shape, bias=True, activation=activation, **GPT2)
    ours.load_state_dict(_from_gpt2(theirs.state_dict(), L))
    idx = tokens(B, T)
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-5, rtol=0)


def _from_gpt2(gpt2: dict[str, torch.Tensor], L: int) -> dict[str, torch.Tensor]:
    """GPT-2's weights under our names. Its Conv1D keeps matrices as (in, out): transposed."""
    weights = {
        "token_embedding.weight": gpt2["transformer.wte.weight"],
        "position_embedding.weight": gpt2["transformer.wpe.weight"],
        "final_norm.weight": gpt2["transformer.ln_f.weight"],
        "final_norm.bias": gpt2["transformer.ln_f.bias"],
    }
    names = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.projection": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.expand": "mlp.c_fc",
        "mlp.projection": "mlp.c_proj",
    }
    for layer in range(L):
        for ours, theirs in names.items():
            weight = gpt2[f"transformer.h.{layer}.{theirs}.weight"]
            weights[f"blocks.{layer}.{ours}.weight"] = weight.T if weight.dim() == 2 else weight
            weights[f"blocks.{layer}.{ours}.bias"] = gpt2[f"transformer.h.{layer}.{theirs}.bias"]
    return weights


# Against Qwen3 --------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    ("activation", "their_name"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh")],
)
def test_the_logits_of_modern_are_those_of_transformers_qwen3(tie, activation, their_name):
    transformers = pytest.importorskip("transformers")
    B, T, C, H, L = 3, 32, 48, 3, 3
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=V,
            max_position_embeddings=T,
            hidden_size=C,
            intermediate_size=128,
            num_hidden_layers=L,
            num_attention_heads=H,
            num_key_value_heads=H,
            head_dim=C // H,
            hidden_act=their_name,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=tie,
            attention_bias=False,
        )
    ).eval()
    shape = {"block_size": T, "n_embd": C, "n_head": H, "n_layer": L}
    ours = awake(make(**shape, rope_theta=500.0, tie_weights=tie, activation=activation))
    theirs.load_state_dict(_as_qwen3(ours.state_dict(), tie))
    idx = tokens(B, T)
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-5, rtol=1e-5)


def _as_qwen3(ours: dict[str, torch.Tensor], tie: bool) -> dict[str, torch.Tensor]:
    """Our weights under Qwen3's names, which keeps queries, keys and values apart."""
    names = {
        "token_embedding": "model.embed_tokens",
        "blocks": "model.layers",
        "attention_norm": "input_layernorm",
        "attention.queries_and_keys.query_norm": "self_attn.q_norm",
        "attention.queries_and_keys.key_norm": "self_attn.k_norm",
        "attention.projection": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.expand": "mlp.up_proj",
        "mlp.projection": "mlp.down_proj",
        "final_norm": "model.norm",
        "head": "lm_head",
    }
    weights = {}
    for name, tensor in ours.items():
        if name.endswith("attention.qkv.weight"):
            layer = name.split(".")[1]
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                weights[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = rows
            continue
        their_name = name
        for part, their_part in names.items():
            their_name = re.sub(rf"(^|\.){part}(?=\.)", rf"\g<1>{their_part}", their_name)
        weights[their_name] = tensor
    if tie:
        weights["lm_head.weight"] = ours["token_embedding.weight"]
    return weights


# Generation -----------------------------------------------------------------------------------


def continued(model, prompt, length, sampling, seed=0) -> list[int]:
    """The rule of `stream`, without a cache: what is in the window is read again for each token."""
    ids, T = list(prompt), model.block_size
    window = ids[-T:]
    numbers = torch.cat(
        [chance for chance, _ in zip(iter_uniforms([seed]), range(2), strict=False)]
    )
    for draw in numbers[:length]:
        if len(window) > T:
            window = window[-(T - T // 2) :]
        logits = model.eval()(torch.tensor([window]))[0][:, -1, : model.num_tokens]
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, ids] = True
        penalised = sampling.repetition_penalty != 1
        token, _ = sample_token(logits, draw, sampling, seen if penalised else None)
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
def test_cached_and_uncached_generation_give_the_same_text_within_block_size_and_beyond(
    architecture, given, sampling
):
    model = awake(make(architecture=architecture, num_tokens=V - 1))
    prompt = tokens(1, given)[0].tolist()
    expected = continued(model, prompt, 30, sampling, seed=3)
    out = model.generate(prompt, 30, sampling, seeds=[3])
    assert out[0].tolist() == expected
    assert len(set(expected)) > 2 or sampling.temperature == 0


@torch.no_grad()
@pytest.mark.parametrize("block_size", [1, 2, 7])
def test_the_window_works_at_any_size(block_size):
    model = awake(make(block_size=block_size))
    sampling = SamplingParams(temperature=2)
    assert model.generate([1, 2], 20, sampling)[0].tolist() == continued(
        model, [1, 2], 20, sampling
    )


def test_what_a_cache_holds_beyond_its_last_position_is_never_seen():
    model, idx = awake(make()).eval(), tokens(1, 4)
    clean, used = KVCache(model, 1), KVCache(model, 1)
    for tensor in (*used.keys, *used.values):
        tensor.fill_(1e3)
    with torch.no_grad():
        expected = model.compute_next_logits(idx, clean.positions[:4], clean)
        assert torch.equal(model.compute_next_logits(idx, used.positions[:4], used), expected)
        torch.testing.assert_close(expected, model(idx)[0][:, -1])


@torch.no_grad()
def test_a_long_text_goes_on_by_the_same_rule():
    model, sampling = awake(make(block_size=4, n_layer=1)), SamplingParams(temperature=2)
    length = UNIFORMS_PER_BATCH + 50  # the draws come in blocks
    out = model.generate([1], length, sampling, seeds=[7])
    assert out[0].tolist() == continued(model, [1], length, sampling, seed=7)


@torch.no_grad()
def test_a_repetition_penalty_knows_the_prompt_beyond_the_window_too():
    model, sampling = awake(make()), SamplingParams(repetition_penalty=100)
    texts = set()
    for first in range(V):
        prompt = [first, *[1] * 9]  # 10 tokens, of which the model reads 8
        out = model.generate(prompt, 10, sampling, seeds=[2])[0].tolist()
        assert out == continued(model, prompt, 10, sampling, seed=2)
        texts.add(tuple(out[1:]))
    assert len(texts) > 2


def test_a_prompt_of_nothing_is_refused():
    with pytest.raises(UserError, match="a prompt needs one token at least"):
        make().generate([], 3)


def test_a_token_costs_the_work_of_one_however_many_were_before():
    model = make(block_size=64).eval()
    lengths = []
    model.blocks[0].register_forward_hook(lambda module, args, out: lengths.append(out.size(1)))
    model.generate([1, 2, 3], 100)
    # The prompt, one by one until 64 are full, and the newer half once more.
    assert lengths == [3] + [1] * 61 + [32] + [1] * 32 + [32] + [1] * 4


def test_generation_keeps_the_prompt_and_adds_as_many_tokens_as_asked():
    prompt = tokens(3, 4)
    out = make().generate(prompt, 20, seeds=[1, 2, 3])
    assert out.shape == (3, 24)
    assert torch.equal(out[:, :4], prompt)
    assert torch.equal(make().generate(prompt, 0, seeds=[1, 2, 3]), prompt)


@pytest.mark.parametrize(
    "prompt",
    [[1, 2], np.array([1, 2], np.uint8), np.array([1, 2], np.uint16), torch.tensor([1, 2])],
)
def test_a_prompt_may_be_ids_of_any_kind(prompt):
    assert make().generate(prompt, 1)[0, :2].tolist() == [1, 2]


def test_a_sample_does_not_depend_on_its_neighbours_nor_on_how_much_is_asked_for():
    model, prompt = awake(make()), [1, 2, 3]
    together = model.generate(prompt, 40, seeds=[5, 6, 7])
    for row, seed in enumerate((5, 6, 7)):
        assert torch.equal(model.generate(prompt, 40, seeds=[seed])[0], together[row])
        assert torch.equal(model.generate(prompt, 11, seeds=[seed])[0], together[row, :14])
    assert len({tuple(row) for row in together.tolist()}) == 3


def test_generation_leaves_the_global_generators_and_the_models_mode_alone():
    model = make(dropout=0.3)
    state = torch.get_rng_state()
    first = model.generate([1], 10, seeds=[4])
    assert torch.equal(first, model.generate([1], 10, seeds=[4]))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for _ in model.stream([1], 10):
        break  # whoever listens may stop at any time
    assert model.training


def test_a_stream_gives_the_same_tokens_as_they_come_and_what_the_model_thought_of_them():
    model, prompt = awake(make()).eval(), [1, 2, 3]
    parts = list(model.stream(prompt, 5, SamplingParams(temperature=0.5), seeds=[1, 2]))
    assert [tuple(ids.shape) for ids, _ in parts] == [(2, 1)] * 5
    out = model.generate(prompt, 5, SamplingParams(temperature=0.5), seeds=[1, 2])
    assert torch.equal(torch.cat([ids for ids, _ in parts], dim=1), out[:, 3:])
    log_probs = model(out[:, :-1])[0].log_softmax(-1)[:, 2:]  # before the temperature
    expected = log_probs.gather(-1, out[:, 3:, None])[..., 0]
    torch.testing.assert_close(torch.cat([each for _, each in parts], dim=1), expected)


def test_attention_is_softmax_of_scaled_scores():
    """The fused attention against the textbook's, head by head."""
    model = make()
    attention, x = model.blocks[0].attention, torch.randn(2, 8, 12)
    q, k, v = attention.qkv(x).split(12, dim=-1)
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(4)
        scores = scores.masked_fill(torch.ones(8, 8).triu(1).bool(), -math.inf)
        heads.append(F.softmax(scores, dim=-1) @ v[..., part])
    expected = attention.projection(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(x, slice(0, 8)), expected)
