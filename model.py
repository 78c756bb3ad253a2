"""The model: a decoder-only transformer over tokens.

The dimensions, here and in the whole project:

    B  batch: sequences side by side           H  attention heads
    T  context: tokens in a sequence           D  head size, C / H
    C  channels: the width (n_embd)            L  layers
    V  vocabulary: how many tokens there are

Blocks normalise before each sub-layer and add to a residual stream; a norm stands at the end.
The other parts are chosen by `architecture`, when the model is built:

                 modern: Qwen3's (arxiv.org/abs/2505.09388)   gpt2 (Radford et al. 2019)
    positions    rotary, in each attention                    learned, added to the tokens
    norm         RMSNorm, of queries and keys too             LayerNorm
    dropout      what branches and tokens add                 and attention weights
    MLP          gated                                        plain
    first        every branch adds nothing                    normal, deviation 0.02

Given the weights of a model of either kind in Transformers, the logits are that model's.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from parameters import ModelConfig
from sampling import (
    DEFAULT_SAMPLING,
    UNIFORMS_PER_BATCH,
    SamplingParams,
    iter_uniforms,
    sample_token,
)
from utils.errors import UserError

RMS_EPSILON = 1e-6  # Qwen3's


def create_norm(config: ModelConfig, size: int) -> nn.Module:
    """The architecture's norm of vectors of `size` channels."""
    if config.architecture == "modern":
        return RMSNorm(size)
    return nn.LayerNorm(size, bias=config.bias)


class RMSNorm(nn.Module):
    """Vectors scaled to a root mean square of 1, times a weight (arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., size)` to the same shape, in float32."""
        return apply_rms_norm(x.float()) * self.weight


def apply_rms_norm(x: Tensor) -> Tensor:
    """X / rms(x) along the last dimension."""
    if x.device.type == "cpu":
        return FusedRMSNorm.apply(x)
    return F.rms_norm(x, x.shape[-1:], eps=RMS_EPSILON)  # one kernel there


class FusedRMSNorm(torch.autograd.Function):
    """`apply_rms_norm` for the CPU, where PyTorch's makes twice as many passes over memory."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """`(..., C)` to the same shape."""
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.size(-1)
        scale = mean_square.add_(RMS_EPSILON).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """What is left of the gradient across y: along it, nothing changes."""
        y, scale = ctx.saved_tensors
        along = (gradient * y).mean(dim=-1, keepdim=True)
        return torch.addcmul(gradient, y, along, value=-1).mul_(scale)


class NoPositions(nn.Module):
    """Stands where the other architecture does something with positions."""

    def forward(self, x: Tensor, positions: slice | Tensor) -> Tensor:
        """What is given."""
        return x


class LearnedPositions(nn.Embedding):
    """A learned vector for each position, added to the token that stands there."""

    def forward(self, x: Tensor, positions: slice | Tensor) -> Tensor:
        """`(B, T, C)` to `(B, T, C)`."""
        return x + self.weight[positions]


class NormedRotary(nn.Module):
    """What queries and keys go through before they meet: a norm, and a turn by their position.

    The norm (arxiv.org/abs/2010.04245) keeps their products from growing. Channels d and d + D/2
    make a pair, which is turned by an angle in proportion to its position
    (arxiv.org/abs/2104.09864): so the product of two says how far apart they stand.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        D = config.n_embd // config.n_head
        self.query_norm = RMSNorm(D)
        self.key_norm = RMSNorm(D)
        frequencies = config.rope_theta ** (-torch.arange(0, D, 2) / D)  # (D/2,)
        angles = torch.outer(torch.arange(config.block_size), frequencies)  # (T, D/2)
        angles = torch.cat((angles, angles), dim=-1)  # (T, D)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, qk: Tensor, positions: slice | Tensor) -> Tensor:
        """Queries and keys together, `(2, B, H, T, D)`, to the same shape, in float32."""
        weight = torch.stack((self.query_norm.weight, self.key_norm.weight))  # (2, D)
        x = apply_rms_norm(qk.float()) * weight[:, None, None, None, :]
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return x * self.cos[positions] + turned * self.sin[positions]


class KVCache:
    """The keys and values of the tokens read so far: each is computed once, and then looked up.

    It has the size of a full context from the beginning: nothing grows or moves, so that what
    reads it can be compiled.

    Args:
        model: whose keys and values they are.
        rows: B, the texts side by side.
    """

    def __init__(self, model: "LanguageModel", rows: int):
        weight, n_head = model.token_embedding.weight, model.blocks[0].attention.n_head
        T, C = model.block_size, weight.size(1)
        shape = (rows, n_head, T, C // n_head)  # (B, H, T, D)
        like = {"dtype": weight.dtype, "device": weight.device}
        self.keys = [torch.zeros(shape, **like) for _ in model.blocks]
        self.values = [torch.zeros(shape, **like) for _ in model.blocks]
        self.positions = torch.arange(T, device=weight.device)

    def layers(self, positions: Tensor) -> "list[LayerCache]":
        """What each layer remembers, for tokens that are read now at `positions`, `(t,)`."""
        # What comes later, or is not there yet: (t, T).
        hidden = self.positions > positions[:, None]
        mask = torch.zeros_like(hidden, dtype=self.keys[0].dtype).masked_fill(hidden, -math.inf)
        pairs = zip(self.keys, self.values, strict=True)
        return [LayerCache(keys, values, mask) for keys, values in pairs]


class LayerCache(NamedTuple):
    """One layer's part of the cache."""

    keys: Tensor  # (B, H, T, D)
    values: Tensor  # (B, H, T, D)
    mask: Tensor  # (t, T): 0 where a token may look, -inf elsewhere

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Remember the new tokens' keys and values; each query's mean of what it may see."""
        self.keys.index_copy_(2, positions, k)
        self.values.index_copy_(2, positions, v)
        if torch.compiler.is_compiling() and q.size(2) == 1:
            # The same, as one loop with what stands around it: a third of the time for one query.
            scores = (q * self.keys).sum(dim=-1) / math.sqrt(q.size(-1)) + self.mask  # (B, H, T)
            return (scores.softmax(dim=-1)[..., None] * self.values).sum(dim=2, keepdim=True)
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=self.mask)


class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and those before it (arxiv.org/abs/1706.03762)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head = config.n_head
        is_modern = config.architecture == "modern"
        # GPT-2 drops attention weights too, which no fast kernel for the CPU can do.
        self.dropout = 0.0 if is_modern else config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.queries_and_keys = NormedRotary(config) if is_modern else NoPositions()
        self.projection = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, positions: slice | Tensor, cache: LayerCache | None = None
    ) -> Tensor:
        """`(B, T, C)` to `(B, T, C)`; a position sees itself and what precedes it."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        (q, k), v = self.queries_and_keys(qkv[:2], positions), qkv[2]  # each (B, H, T, D)
        if cache is None:
            # SDPA knows nothing of eval(): dropout must be switched off by hand.
            y = attend(q, k, v, self.dropout if self.training else 0.0)
        else:
            y = cache.attend(q, k, v, positions)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        return self.residual_dropout(self.projection(y))


def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Each query's mean of the values at or before it, `(B, H, T, D)`, by its keys."""
    if q.device.type == "cpu":
        # PyTorch's kernel for the CPU is five times slower in bfloat16 than in float32.
        with torch.autocast("cpu", enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
    q, k = q.to(v.dtype), k.to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)


class MLP(nn.Module):
    """Each position by itself: four times as wide, a non-linearity, and back."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.expand = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.activation = create_activation(config)
        self.projection = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` to `(B, T, C)`; positions do not see each other."""
        return self.residual_dropout(self.projection(self.activation(self.expand(x))))


class GatedMLP(nn.Module):
    """Each position by itself: wider, each channel times its gate, and back (SwiGLU).

    arxiv.org/abs/2002.05202. Three matrices of 8/3 C have as many weights as two of 4 C.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = compute_gated_width(config.n_embd)
        self.gate = nn.Linear(config.n_embd, hidden, bias=False)
        self.expand = nn.Linear(config.n_embd, hidden, bias=False)
        self.activation = create_activation(config)
        self.projection = nn.Linear(hidden, config.n_embd, bias=False)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` to `(B, T, C)`; positions do not see each other."""
        x = self.activation(self.gate(x)) * self.expand(x)
        return self.residual_dropout(self.projection(x))


def compute_gated_width(n_embd: int) -> int:
    """The channels inside a gated MLP: 8/3 C, rounded up to what processors like."""
    return math.ceil(n_embd * 8 / 3 / 32) * 32


def create_activation(config: ModelConfig) -> nn.Module:
    """The MLP's non-linearity. GELU: arxiv.org/abs/1606.08415; GPT-2 has its approximation."""
    if config.activation == "silu":
        return nn.SiLU()
    return nn.GELU("tanh" if config.activation == "gelu_tanh" else "none")


class Block(nn.Module):
    """One layer. Norms stand before the sub-layers (arxiv.org/abs/2002.04745)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = create_norm(config, config.n_embd)
        self.attention = CausalSelfAttention(config)
        self.mlp_norm = create_norm(config, config.n_embd)
        self.mlp = GatedMLP(config) if config.architecture == "modern" else MLP(config)

    def forward(
        self, x: Tensor, positions: slice | Tensor, cache: LayerCache | None = None
    ) -> Tensor:
        """`(B, T, C)` to `(B, T, C)`: the residual stream, and what this layer adds to it."""
        x = x + self.attention(self.attention_norm(x), positions, cache)
        x = x + self.mlp(self.mlp_norm(x))
        return x


class FastDecoder(NamedTuple):
    """`LanguageModel.decode`, made faster."""

    decode: Callable[..., tuple[Tensor, Tensor]]
    at_once: int  # how many tokens it chooses in a call


class LanguageModel(nn.Module):
    """A transformer that predicts the next token at every position.

    Args:
        config: the architecture's settings are all that is read.
        vocab_size: V, the tokenizer's.
        num_tokens: the tokenizer's; the ids from there on are padding, and never generated.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, num_tokens: int | None = None):
        super().__init__()
        self.block_size = config.block_size
        self.vocab_size = vocab_size
        self.num_tokens = num_tokens or vocab_size
        self.token_embedding = nn.Embedding(vocab_size, config.n_embd)
        is_modern = config.architecture == "modern"
        self.position_embedding = (
            NoPositions() if is_modern else LearnedPositions(config.block_size, config.n_embd)
        )
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = create_norm(config, config.n_embd)
        # A tied head (arxiv.org/abs/1608.05859) has no tensor of its own: nothing to keep in
        # step when the weights are loaded, moved or saved.
        self.head = None if config.tie_weights else nn.Linear(config.n_embd, vocab_size, bias=False)
        deviation = get_modern_init_std if is_modern else get_gpt2_init_std
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                (nn.init.zeros_ if name.endswith("bias") else nn.init.ones_)(parameter)
            else:
                nn.init.normal_(parameter, std=deviation(name, parameter, config))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits, and the mean cross-entropy in nats where `targets` are given.

        Args:
            idx: token ids, `(B, T)` int64, with T at most `block_size`.
            targets: the id that follows each, `(B, T)` int64.

        Returns:
            logits `(B, T, V)`, and the loss, a scalar, or None.
        """
        B, T = idx.shape
        assert self.block_size >= T, f"{T} tokens are more than block_size {self.block_size}"
        positions = slice(0, T)
        x = self.position_embedding(self.token_embedding(idx), positions)  # (B, T, C)
        x = self.embedding_dropout(x)
        for block in self.blocks:
            x = block(x, positions)
        logits = self._logits(x)  # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.float().view(B * T, -1), targets.reshape(B * T))
        return logits, loss

    def _logits(self, x: Tensor) -> Tensor:
        """`(B, T, C)` at the end of the blocks to `(B, T, V)`."""
        head = self.token_embedding if self.head is None else self.head
        return F.linear(self.final_norm(x), head.weight)

    def compute_next_logits(self, idx: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """What comes after tokens that follow those in the cache: logits `(B, V)`.

        Args:
            idx: the ids, `(B, t)` int64: a prompt, or the one token that was chosen last.
            positions: where they stand, `(t,)` int64, each below `block_size`.
            cache: of the positions before; these are added to it.
        """
        x = self.position_embedding(self.token_embedding(idx), positions)  # (B, t, C)
        for block, layer in zip(self.blocks, cache.layers(positions), strict=True):
            x = block(x, positions, layer)
        return self._logits(x[:, -1:])[:, 0]

    def decode(
        self,
        idx: Tensor,
        positions: Tensor,
        cache: KVCache,
        draws: Tensor,
        sampling: SamplingParams,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Read `idx`, choose the next token and read that, as often as there are draws.

        Args:
            idx: the ids that are not in the cache yet, `(B, t)` int64.
            positions: where they stand, `(t,)` int64.
            cache: of the positions before; all that is read is added to it.
            draws: numbers in [0, 1), `(n, B)`: n tokens are chosen, and n - 1 of them read.
            sampling: how they are chosen.
            seen: which tokens the text has, `(B, num_tokens)` bool, kept up to date; or None.

        Returns:
            the tokens, `(B, n)` int64, and the model's logarithms of their probabilities.
        """
        tokens, log_probs = [], []
        for draw in draws:
            logits = self.compute_next_logits(idx, positions, cache)[:, : self.num_tokens]
            idx, log_prob = sample_token(logits, draw, sampling, seen)  # (B, 1)
            positions = positions[-1:] + 1
            if seen is not None:
                seen.scatter_(1, idx, True)
            tokens.append(idx)
            log_probs.append(log_prob)
        return torch.cat(tokens, dim=1), torch.cat(log_probs, dim=1)

    @torch.inference_mode()
    def stream(
        self,
        prompt: Sequence[int] | np.ndarray | Tensor,
        max_new_tokens: int,
        sampling: SamplingParams = DEFAULT_SAMPLING,
        *,
        seeds: Sequence[int] = (0,),
        fast: FastDecoder | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Continue a prompt, as many times side by side as there are seeds.

        Of the prompt, the last `block_size` tokens are read. Their keys and values stay in a
        cache, so that each further token costs the work of one. When the cache is full, the newer
        half of it is read again, as a prompt is, and the older half forgotten: so the model always
        sees half a context at least, at positions that it has learnt, and half a context written
        costs half a context read.

        Args:
            prompt: its ids, one at least: `(T,)`, or `(B, T)` with one for each seed.
            max_new_tokens: how many tokens to add to it.
            sampling: how each is chosen.
            seeds: one for each of the B texts. The same seed gives the same text, alone or not.
            fast: `decode`, made faster; where it cannot be used, the plain one is.

        Yields:
            the next tokens, `(B, n)` int64, and the model's logarithms of their probabilities,
            `(B, n)`; n is 1, or more where `fast` chooses several at once.
        """
        device, T = self.token_embedding.weight.device, self.block_size
        given = torch.as_tensor(prompt).to(device, torch.int64).expand(len(seeds), -1)
        if given.size(1) == 0:
            raise UserError("a prompt needs one token at least")
        chances = iter_uniforms(seeds)
        seen = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros((len(seeds), self.vocab_size), dtype=torch.bool, device=device)
            seen = seen.scatter_(1, given, True)[:, : self.num_tokens]
        cache = KVCache(self, len(seeds))
        was_training = self.training
        self.eval()
        try:
            recent = unread = given[:, -T:]
            position = done = 0
            while done < max_new_tokens:
                if position == T:  # the cache is full
                    unread, position = recent[:, T // 2 :], 0
                used = done % UNIFORMS_PER_BATCH
                if used == 0:
                    chance = next(chances).to(device)
                decode, number = self.decode, 1
                room = min(T - position, max_new_tokens - done, UNIFORMS_PER_BATCH - used)
                if fast is not None and unread.size(1) == 1 and fast.at_once <= room:
                    decode, number = fast
                elif fast is not None and done > 0 and position == 0:
                    decode = fast.decode
                tokens, log_probs = decode(
                    # Compiled code is made for these strides, whatever the chunk before.
                    unread.clone(memory_format=torch.contiguous_format),
                    cache.positions[position : position + unread.size(1)],
                    cache,
                    chance[used : used + number],
                    sampling,
                    seen,
                )
                position += unread.size(1) + number - 1
                recent = torch.cat((recent, tokens), dim=1)[:, -T:]
                unread, done = tokens[:, -1:], done + number
                yield tokens, log_probs
        finally:
            self.train(was_training)

    def generate(
        self,
        prompt: Sequence[int] | np.ndarray | Tensor,
        max_new_tokens: int,
        sampling: SamplingParams = DEFAULT_SAMPLING,
        *,
        seeds: Sequence[int] = (0,),
    ) -> Tensor:
        """Prompt and continuation, `(B, T + max_new_tokens)` int64: see `stream`."""
        device = self.token_embedding.weight.device
        given = torch.as_tensor(prompt).to(device, torch.int64).expand(len(seeds), -1)
        parts = self.stream(given, max_new_tokens, sampling, seeds=seeds)
        return torch.cat([given, *(tokens for tokens, _ in parts)], dim=1)

    def get_block_matrices(self) -> dict[str, Tensor]:
        """The matrices of the blocks by name, `(outputs, inputs)` each: what Muon is for."""
        named = self.blocks.named_parameters(prefix="blocks")
        return {name: parameter for name, parameter in named if parameter.dim() == 2}

    def count_parameters(self) -> int:
        """How many numbers are learned; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save_safetensors(
        self,
        path: Path,
        metadata: dict[str, str] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the weights in the safetensors format, under the names they have here.

        `weights` are given where this process holds a part of them alone.
        """
        weights = self.state_dict() if weights is None else weights
        tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})

    def load_safetensors(self, content: bytes) -> None:
        """Put weights that `save_safetensors` wrote into this model, in place.

        Where this vocabulary is larger, its further rows stay as they are.

        Raises RuntimeError where a name or a shape is not this model's.
        """
        tensors = load(content)
        for name, tensor in self.get_vocab_tensors().items():
            rows = tensors.get(name)
            if rows is not None and rows.size(0) < self.vocab_size:
                tensors[name] = torch.cat((rows, tensor[rows.size(0) :].to(rows)))
        self.load_state_dict(tensors)

    def get_vocab_tensors(self) -> dict[str, Tensor]:
        """The weights that have a row for each token, `(V, C)`."""
        names = ("token_embedding.weight", "head.weight")
        return {name: tensor for name, tensor in self.state_dict().items() if name in names}


def get_gpt2_init_std(name: str, parameter: Tensor, config: ModelConfig) -> float:
    """GPT-2's first weights: 0.02, and less at the end of each of the 2 L residual branches.

    Scaling by 1 / sqrt(2 L) keeps the variance of the branches' sum that of one.
    """
    return 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("projection.weight") else 0.02


def get_modern_init_std(name: str, parameter: Tensor, config: ModelConfig) -> float:
    """The first weights of `modern`: what ends a branch, and a head of its own, begin at zero.

    So the first steps see the tokens alone (arxiv.org/abs/2203.03466 has the reasons), and what
    stands before is scaled to its inputs.
    """
    if name.endswith(("projection.weight", "head.weight")):
        return 0.0
    if name.endswith("embedding.weight"):
        return 0.02 if config.tie_weights else 0.2
    return 0.7 / math.sqrt(parameter.size(1))
