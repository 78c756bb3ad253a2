"""The network: a decoder-only transformer over tokens, and its loss.

The dimensions, here and in the whole project:

    B  batch: sequences in a batch             H  attention heads
    T  context: tokens in a sequence           D  head size, C / H
    C  channels: the width (n_embd)            L  layers
    V  vocabulary size

A norm precedes each sub-layer, whose output is added to the residual stream (pre-norm); a final
norm precedes the LM head. `architecture` chooses the other parts:

                    modern: Qwen3's (arxiv.org/abs/2505.09388)   gpt2 (Radford et al. 2019)
    positions       rotary, in each attention                    learned, added to the tokens
    norm            RMSNorm, of queries and keys too             LayerNorm
    dropout         of embeddings and residual branches          of attention weights too
    MLP             gated                                        plain
    initialization  residual projections start at zero           normal, std 0.02

With the weights of a Qwen3 or GPT-2 model of Transformers that has this shape, the logits are its
logits. `speedrun` is modern with n-gram embeddings, which learn faster, and which Qwen3 lacks.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from parameters import NGRAM_FACTORS, NGRAM_REACH, ModelConfig
from utils.kernels import (
    apply_causal_attention,
    apply_dropout,
    apply_normed_rotary,
    apply_rms_norm,
)

Ids = Tensor | np.ndarray | Sequence[int]
"""Token ids, `(B, T)` or `(T,)`."""


class LayerCache(Protocol):
    """One layer's part of a KV cache (see decode_torch.py)."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Append keys and values at `positions`, then attend to all of the cache."""


class KVCache(Protocol):
    """The keys and values of earlier tokens, and their ids (see decode_torch.py)."""

    def append_tokens(self, idx: Tensor, positions: Tensor) -> Tensor:
        """Append `idx`, `(B, t)`, and return it as `NgramEmbedding` reads it."""

    def get_layers(self, positions: Tensor) -> Sequence[LayerCache]:
        """Return each layer's part, for new tokens at `positions`, `(t,)`."""


def create_norm(config: ModelConfig) -> nn.Module:
    """Return the architecture's norm over the C channels."""
    if config.architecture == "gpt2":
        return nn.LayerNorm(config.n_embd, bias=config.bias)
    return RMSNorm(config.n_embd)


class RMSNorm(nn.Module):
    """Scale vectors to a root mean square of 1, times a weight (arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, `(..., size)`, in float32."""
        return apply_rms_norm(x.float(), self.weight)


class Dropout(nn.Dropout):
    """Dropout (arxiv.org/abs/1207.0580)."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of x in training."""
        return apply_dropout(x, self.p) if self.training else x


class NoPositions(nn.Module):
    """The identity: this architecture does nothing with positions here."""

    def forward(self, x: Tensor, positions: slice | Tensor) -> Tensor:
        """Return x unchanged."""
        return x


class LearnedPositions(nn.Embedding):
    """A learned vector for each position, added to the token's embedding."""

    def forward(self, x: Tensor, positions: slice | Tensor) -> Tensor:
        """Add the vectors of `positions` to x, `(B, T, C)`."""
        return x + self.weight[positions]


class NgramEmbedding(nn.Embedding):
    """Embeddings of the last two, three and four tokens at each position, summed.

    Without them, the first layers spend much of a small model's capacity on the preceding tokens
    (n-gram embeddings: arxiv.org/abs/2501.16975). The n-grams share the rows of one hashed table
    (arxiv.org/abs/1709.03933).
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config.ngram_rows, config.n_embd)
        self.register_buffer("factors", torch.tensor(NGRAM_FACTORS), persistent=False)  # (3, 4)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the sum of these vectors for t tokens, `(B, t, C)`.

        `ids`, `(B, NGRAM_REACH + t)`, are those of the tokens plus 1, after the same of the tokens
        before them, 0 where there is none. An n-gram's row is the sum of `ids` times NGRAM_FACTORS,
        modulo the number of rows.
        """
        windows = ids.unfold(1, NGRAM_REACH + 1, 1)[:, :, None]  # (B, t, 1, 4)
        sums = (windows * self.factors).sum(dim=-1)  # (B, t, 3)
        return super().forward(sums % self.num_embeddings).sum(dim=-2)


class NormedRotary(nn.Module):
    """Query-key norm, then rotary position embedding.

    The norm (arxiv.org/abs/2010.04245) bounds the attention scores. Rotary embedding
    (arxiv.org/abs/2104.09864) rotates each pair of channels d and d + D/2 by an angle proportional
    to the position, so that positions enter the dot product of a query and a key only through
    their difference.
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
        """Normalize and rotate queries and keys, `(2, B, H, T, D)`, in float32."""
        weights = torch.stack((self.query_norm.weight, self.key_norm.weight))  # (2, D)
        return apply_normed_rotary(qk, weights, self.cos[positions], self.sin[positions])


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention (arxiv.org/abs/1706.03762)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head = config.n_head
        is_gpt2 = config.architecture == "gpt2"
        # modern has no attention dropout, as no fused kernel for the CPU supports it.
        self.dropout = config.dropout if is_gpt2 else 0.0
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.queries_and_keys = NoPositions() if is_gpt2 else NormedRotary(config)
        self.projection = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.residual_dropout = Dropout(config.dropout)

    def forward(
        self, x: Tensor, positions: slice | Tensor, cache: LayerCache | None = None
    ) -> Tensor:
        """Compute attention over x, `(B, T, C)`, or over the cache and x."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        qk, v = qkv.split((2, 1))  # unlike slices, without a gradient of zeros for the other part
        (q, k), v = self.queries_and_keys(qk, positions), v.squeeze(0)  # each (B, H, T, D)
        if cache is None:
            # In modern, q and k are float32 and v has the autocast dtype: the kernel casts them.
            y = apply_causal_attention(q, k, v, self.dropout if self.training else 0.0)
        else:
            y = cache.attend(q, k, v, positions)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        return self.residual_dropout(self.projection(y))


class MLP(nn.Module):
    """GPT-2's MLP: up projection to 4 C channels, activation, down projection."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.expand = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.activation = create_activation(config)
        self.projection = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.residual_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x, `(B, T, C)`, position by position."""
        return self.residual_dropout(self.projection(self.activation(self.expand(x))))


class GatedMLP(nn.Module):
    """Gated MLP (SwiGLU, arxiv.org/abs/2002.05202): the up projection times an activated gate."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = get_gated_width(config.n_embd)
        self.gate = nn.Linear(config.n_embd, hidden, bias=False)
        self.expand = nn.Linear(config.n_embd, hidden, bias=False)
        self.activation = create_activation(config)
        self.projection = nn.Linear(hidden, config.n_embd, bias=False)
        self.residual_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x, `(B, T, C)`, position by position."""
        x = self.activation(self.gate(x)) * self.expand(x)
        return self.residual_dropout(self.projection(x))


def get_gated_width(n_embd: int) -> int:
    """Return the width of the gated MLP: 8/3 C, rounded up to a multiple of 32.

    Three matrices of this width have as many weights as two of width 4 C.
    """
    return math.ceil(n_embd * 8 / 3 / 32) * 32


def create_activation(config: ModelConfig) -> nn.Module:
    """Return the MLP's activation. GELU: arxiv.org/abs/1606.08415; GPT-2 used gelu_tanh."""
    if config.activation == "silu":
        return nn.SiLU()
    return nn.GELU("tanh" if config.activation == "gelu_tanh" else "none")


class Block(nn.Module):
    """A pre-norm transformer block (arxiv.org/abs/2002.04745)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = create_norm(config)
        self.attention = CausalSelfAttention(config)
        self.mlp_norm = create_norm(config)
        self.mlp = MLP(config) if config.architecture == "gpt2" else GatedMLP(config)

    def forward(
        self, x: Tensor, positions: slice | Tensor, cache: LayerCache | None = None
    ) -> Tensor:
        """Add both residual branches to x, `(B, T, C)`."""
        x = x + self.attention(self.attention_norm(x), positions, cache)
        x = x + self.mlp(self.mlp_norm(x))
        return x


class LanguageModel(nn.Module):
    """A transformer that predicts the next token at every position.

    Args:
        config: only the settings of the architecture are read.
        vocab_size: V, the number of rows of the embedding.
        num_tokens: number of ids that stand for text; those above are padding, never generated.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, num_tokens: int | None = None):
        super().__init__()
        self.block_size = config.block_size
        self.vocab_size = vocab_size
        self.num_tokens = num_tokens or vocab_size
        self.token_embedding = nn.Embedding(vocab_size, config.n_embd)
        is_speedrun = config.architecture == "speedrun"
        self.ngram_embedding = NgramEmbedding(config) if is_speedrun else None
        is_gpt2 = config.architecture == "gpt2"
        self.position_embedding = (
            LearnedPositions(config.block_size, config.n_embd) if is_gpt2 else NoPositions()
        )
        self.embedding_dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = create_norm(config)
        # A tied head (arxiv.org/abs/1608.05859) has no parameter of its own: loading, moving and
        # saving the weights need no special case.
        self.head = None if config.tie_weights else nn.Linear(config.n_embd, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=get_init_std(name, parameter, config))
            elif name.endswith("bias"):  # the norms' weights are ones already
                nn.init.zeros_(parameter)

    def forward(self, idx: Ids, targets: Ids | None = None) -> tuple[Tensor, Tensor | None]:
        """Compute the logits and, given `targets`, the mean cross-entropy in nats.

        Args:
            idx: token ids, `(B, T)`, with T at most `block_size`; or `(T,)`, as `encode` of a
                tokenizer returns them, which is a batch of one.
            targets: the id that follows each, in the same shape.

        Returns:
            logits `(B, T, V)`, and the loss, a scalar, or None.
        """
        idx = as_batch(idx, self.token_embedding.weight.device)
        B, T = idx.shape
        assert self.block_size >= T, f"{T} tokens are more than block_size {self.block_size}"
        positions = slice(0, T)
        x = self.position_embedding(self.token_embedding(idx), positions)  # (B, T, C)
        if self.ngram_embedding is not None:
            x = x + self.ngram_embedding(F.pad(idx + 1, (NGRAM_REACH, 0)))
        x = self.embedding_dropout(x)
        for block in self.blocks:
            x = block(x, positions)
        logits = self._compute_logits(x)  # (B, T, V)
        if targets is None:
            return logits, None
        targets = as_batch(targets, idx.device)
        loss = F.cross_entropy(logits.float().view(B * T, -1), targets.reshape(B * T))
        return logits, loss

    def _compute_logits(self, x: Tensor) -> Tensor:
        """Compute logits `(B, T, V)` from the last block's output, `(B, T, C)`."""
        head = self.token_embedding if self.head is None else self.head
        return F.linear(self.final_norm(x), head.weight)

    def compute_next_logits(self, idx: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """Compute the logits `(B, V)` of the token after `idx`; `idx` itself follows the cache.

        Args:
            idx: token ids, `(B, t)` int64: a prompt, or the token generated last.
            positions: their positions, `(t,)` int64, each below `block_size`.
            cache: keys and values of earlier positions; those of `idx` are appended.
        """
        x = self.position_embedding(self.token_embedding(idx), positions)  # (B, t, C); no dropout
        if self.ngram_embedding is not None:
            x = x + self.ngram_embedding(cache.append_tokens(idx, positions))
        for block, layer in zip(self.blocks, cache.get_layers(positions), strict=True):
            x = block(x, positions, layer)
        return self._compute_logits(x[:, -1:])[:, 0]

    def get_block_matrices(self) -> dict[str, Tensor]:
        """Return the blocks' matrices by name, each `(outputs, inputs)`: Muon's parameters."""
        named = self.blocks.named_parameters(prefix="blocks")
        return {name: parameter for name, parameter in named if parameter.dim() == 2}

    def count_parameters(self) -> int:
        """Return the number of parameters, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save_safetensors(
        self,
        path: Path,
        metadata: dict[str, str] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the state dict, or gathered `weights`, in the safetensors format."""
        weights = self.state_dict() if weights is None else weights
        tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})

    def load_safetensors(self, content: bytes) -> None:
        """Load the bytes of a safetensors file into this model, in place.

        If this vocabulary is larger than the file's, the extra rows keep their values.

        Raises RuntimeError if a name or a shape differs from this model's.
        """
        tensors = load(content)
        for name, tensor in self.state_dict().items():
            rows = tensors.get(name)
            has_vocab = name in ("token_embedding.weight", "head.weight")  # (V, C)
            if has_vocab and rows is not None and rows.size(0) < self.vocab_size:
                tensors[name] = torch.cat((rows, tensor[rows.size(0) :].to(rows)))
        self.load_state_dict(tensors)


def as_batch(ids: Ids, device: torch.device) -> Tensor:
    """Return token ids as `(B, T)` int64; `(T,)` becomes a batch of one."""
    if isinstance(ids, Tensor) and ids.dim() == 2 and ids.dtype == torch.int64:
        return ids  # a batch of training
    ids = torch.as_tensor(ids, dtype=torch.int64, device=device)
    return ids if ids.dim() == 2 else ids[None]


def get_init_std(name: str, parameter: Tensor, config: ModelConfig) -> float:
    """Return the standard deviation with which a matrix is initialized.

    GPT-2 scales residual projections, so that the 2 L branches together have the variance of one.
    `modern` starts with these and an untied head at 0 (reasons in arxiv.org/abs/2203.03466): each
    block is the identity at first, and with an untied head all tokens are equally likely. The std
    of the blocks' other matrices is 0.7 / sqrt(inputs). N-gram embeddings start at 0, too.
    """
    if config.architecture == "gpt2":
        return 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("projection.weight") else 0.02
    if name.endswith(("projection.weight", "head.weight", "ngram_embedding.weight")):
        return 0.0
    if name.endswith("embedding.weight"):
        return 0.02 if config.tie_weights else 0.2
    return 0.7 / math.sqrt(parameter.size(1))
