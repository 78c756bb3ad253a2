"""model.py: the transformer and its loss.

python -m pytest tests/test_model.py
"""

import math
import re

import pytest
import torch
from torch.nn import functional as F

from model import LanguageModel
from parameters import ModelConfig
from tokenizer import create_tokenizer

V = 11
GPT2 = {"architecture": "gpt2"}


def make(seed: int = 0, num_tokens: int | None = None, **changes) -> LanguageModel:
    settings = {"n_embd": 12, "n_head": 3, "n_layer": 2, "block_size": 8}
    torch.manual_seed(seed)
    return LanguageModel(ModelConfig(**{**settings, **changes}), V, num_tokens)


def randomize(model: torch.nn.Module, std: float = 0.2) -> torch.nn.Module:
    """Randomize all weights, so that none is 0 or 1."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


@pytest.fixture(params=["modern", "gpt2", "speedrun"])
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


def test_the_ids_that_a_tokenizer_returns_are_a_batch_of_one():
    tokenizer = create_tokenizer("abcdefghijk")
    model, ids = make(), tokenizer.encode("acbk")
    batch = torch.tensor([[0, 2, 1, 10]])
    logits, loss = model(batch[:, :-1], batch[:, 1:])
    for form in (ids, ids.tolist(), batch[0], torch.from_numpy(ids), ids[None], batch.int()):
        halves = [form[:-1], form[1:]] if len(form) > 1 else [form[:, :-1], form[:, 1:]]
        found, found_loss = model(*halves)
        assert torch.equal(found, logits) and torch.equal(found_loss, loss)
    assert model(ids)[1] is None


def test_the_loss_of_an_untrained_model_is_about_log_v(architecture):
    _, loss = make(n_embd=48, architecture=architecture)(tokens(64), tokens(64, seed=2))
    assert loss.item() == pytest.approx(math.log(V), abs=0.1)


def test_a_position_attends_to_itself_and_the_past_but_not_the_future(architecture):
    model, idx = randomize(make(architecture=architecture)), tokens(1)
    before = model(idx)[0]
    idx[0, 5] = (idx[0, 5] + 1) % V
    after = model(idx)[0]
    assert torch.equal(before[0, :5], after[0, :5])
    assert not torch.allclose(before[0, 5], after[0, 5])
    assert not torch.allclose(before[0, 7], after[0, 7])


def test_sequences_of_a_batch_do_not_affect_each_other(architecture):
    model, idx = randomize(make(architecture=architecture)), tokens(3)
    together = model(idx)[0]
    alone = torch.cat([model(row[None])[0] for row in idx])
    torch.testing.assert_close(together, alone)


def test_a_sequence_may_be_shorter_than_block_size_but_not_longer():
    assert make()(tokens(T=1))[0].shape == (2, 1, V)
    with pytest.raises(AssertionError):
        make()(tokens(T=9))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_bias_and_tie_weights_determine_the_parameters(tie, bias):
    model = make(tie_weights=tie, bias=bias, **GPT2)
    names = dict(model.named_parameters())
    assert ("head.weight" in names) is not tie
    assert any(name.endswith("bias") for name in names) is bias
    C, L, T = 12, 2, 8
    vectors = (2 * L + 1) * C * (2 if bias else 1) + (L * (3 + 1 + 4 + 1) * C if bias else 0)
    expected = V * C * (1 if tie else 2) + T * C + L * 12 * C * C + vectors
    assert model.count_parameters() == expected


def test_gpt2_is_initialized_with_its_standard_deviations():
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
def test_modern_initializes_residual_projections_to_zero(tie):
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


def test_modern_has_three_matrices_in_its_mlp_and_no_learned_positions():
    C, L, D, hidden = 48, 2, 16, 128
    matrices = V * C * 2 + L * (4 * C * C + 3 * C * hidden)
    vectors = (2 * L + 1) * C + L * 2 * D
    assert make(n_embd=C, n_head=3, n_layer=L).count_parameters() == matrices + vectors


def test_speedrun_is_modern_and_a_vector_each_for_the_last_two_three_and_four_tokens():
    rows = 1009
    model = randomize(make(architecture="speedrun", ngram_rows=rows))
    modern, idx = make(), tokens(1)
    table, embedding = model.ngram_embedding.weight, modern.token_embedding
    modern.load_state_dict(
        {name: tensor for name, tensor in model.state_dict().items() if "ngram" not in name}
    )
    before = [0, 0, 0, *(id + 1 for id in idx[0].tolist())]  # 0 stands for no token
    vectors = []
    for i in range(idx.size(1)):
        a, b, c, d = before[i : i + 4]
        sums = (
            1273642419 * c + 2038074743 * d,
            1500450271 * b + 715225739 * c + 1299709 * d,
            472882027 * a + 982451653 * b + 334214459 * c + 1076363779 * d,
        )
        vectors.append(embedding(idx)[0, i] + sum(table[each % rows] for each in sums))
    embedding.register_forward_hook(lambda *_: torch.stack(vectors)[None])
    torch.testing.assert_close(model(idx)[0], modern(idx)[0])


def test_the_same_token_after_other_tokens_has_other_n_grams():
    model = randomize(make(architecture="speedrun"))
    found = model.ngram_embedding(torch.tensor([[0, 0, 0, 5, 3, 7, 6], [0, 0, 0, 4, 3, 7, 6]]))
    assert found.shape == (2, 4, 12)
    assert not (found[0] == found[1]).any()  # the last token's longest begins three before it


def test_block_matrices_are_all_matrices_of_the_blocks_and_nothing_else(architecture):
    model = make(architecture=architecture, tie_weights=False)
    names = set(model.get_block_matrices())
    assert names == {n for n, p in model.named_parameters() if "blocks" in n and p.dim() == 2}
    assert len(names) == 2 * (4 if architecture == "gpt2" else 5)


def test_dropout_is_active_in_training_mode_only(architecture):
    model, idx = randomize(make(dropout=0.5, architecture=architecture)), tokens()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])
    same = make(architecture=architecture)
    same.load_state_dict(model.state_dict())
    assert torch.equal(same(idx)[0], model(idx)[0])


def test_every_parameter_has_a_gradient(architecture):
    bias = architecture == "gpt2"
    model = randomize(make(bias=bias, tie_weights=False, architecture=architecture))
    model(tokens(), tokens(seed=2))[1].backward()
    for name, parameter in model.named_parameters():
        # A key's bias adds the same to all scores of a query: softmax cancels it.
        grad = parameter.grad[24:] if name.endswith("qkv.bias") else parameter.grad
        assert grad.abs().max() > 0, name


@pytest.mark.parametrize("tie", [True, False])
def test_weights_are_the_same_after_saving_and_loading_safetensors(tmp_path, tie, architecture):
    settings = {"tie_weights": tie, "architecture": architecture}
    model, other = randomize(make(**settings)), make(seed=5, **settings)
    model.save_safetensors(tmp_path / "m.safetensors", {"step": "3"})
    other.load_safetensors((tmp_path / "m.safetensors").read_bytes())
    assert torch.equal(model(tokens())[0], other(tokens())[0])


def test_attention_is_the_softmax_of_scaled_scores_of_each_head():
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
    randomize(theirs)
    shape = {"block_size": T, "n_embd": C, "n_head": H, "n_layer": L}
    ours = make(**shape, bias=True, activation=activation, **GPT2)
    ours.load_state_dict(convert_from_gpt2(theirs.state_dict(), L))
    idx = tokens(B, T)
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-5, rtol=0)


def convert_from_gpt2(gpt2: dict[str, torch.Tensor], L: int) -> dict[str, torch.Tensor]:
    """Rename GPT-2's weights; its Conv1D stores matrices as (in, out), so transpose them."""
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
    ours = randomize(make(**shape, rope_theta=500.0, tie_weights=tie, activation=activation))
    theirs.load_state_dict(convert_to_qwen3(ours.state_dict(), tie))
    idx = tokens(B, T)
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-5, rtol=1e-5)


def convert_to_qwen3(ours: dict[str, torch.Tensor], tie: bool) -> dict[str, torch.Tensor]:
    """Rename our weights; Qwen3 has separate matrices for queries, keys and values."""
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


def test_the_names_of_the_weights_are_those_of_the_saved_bundles(architecture):
    names = set(make(architecture=architecture, n_layer=1, bias=False).state_dict())
    common = "token_embedding blocks.0.attention.qkv blocks.0.attention.projection final_norm"
    common += " blocks.0.attention_norm blocks.0.mlp_norm blocks.0.mlp.expand"
    common += " blocks.0.mlp.projection"
    modern = "blocks.0.attention.queries_and_keys.query_norm blocks.0.mlp.gate"
    modern += " blocks.0.attention.queries_and_keys.key_norm"
    own = {
        "modern": modern,
        "gpt2": "position_embedding",
        "speedrun": f"{modern} ngram_embedding",
    }[architecture]
    assert names - {"head.weight"} == {f"{name}.weight" for name in f"{common} {own}".split()}
