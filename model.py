"""The model: a decoder-only transformer over tokens.

The dimensions, here and in the whole project:

    B  batch: sequences side by side           H  attention heads
    T  context: tokens in a sequence           D  head size, C / H
    C  channels: the width (n_embd)            L  layers
    V  vocabulary: how many tokens there are

The network is GPT-2's (Radford et al. 2019): learned positions, blocks that normalise before
each sub-layer and add to a residual stream, a norm at the end. Given GPT-2's settings and
weights, the logits are GPT-2's.
"""

import math
from pathlib import Path

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from parameters import ModelConfig


class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and those before it (arxiv.org/abs/1706.03762)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.projection = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` to `(B, T, C)`; a position sees itself and what precedes it."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        # SDPA knows nothing of eval(): dropout must be switched off by hand.
        dropout_p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        return self.residual_dropout(self.projection(y))


class MLP(nn.Module):
    """Each position by itself: four times as wide, a non-linearity, and back."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.expand = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        # GELU: arxiv.org/abs/1606.08415. GPT-2 was trained with its tanh approximation.
        self.activation = nn.GELU("tanh" if config.activation == "gelu_tanh" else "none")
        self.projection = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` to `(B, T, C)`; positions do not see each other."""
        return self.residual_dropout(self.projection(self.activation(self.expand(x))))


class Block(nn.Module):
    """One layer. Norms stand before the sub-layers (arxiv.org/abs/2002.04745)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attention = CausalSelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` to `(B, T, C)`: the residual stream, and what this layer adds to it."""
        x = x + self.attention(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return x


class LanguageModel(nn.Module):
    """A transformer that predicts the next token at every position.

    Args:
        config: the architecture's settings are all that is read.
        vocab_size: V, the tokenizer's.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.block_size = config.block_size
        self.vocab_size = vocab_size
        self.token_embedding = nn.Embedding(vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = nn.LayerNorm(config.n_embd, bias=config.bias)
        # A tied head (arxiv.org/abs/1608.05859) has no tensor of its own: nothing to keep in
        # step when the weights are loaded, moved or saved.
        self.head = None if config.tie_weights else nn.Linear(config.n_embd, vocab_size, bias=False)
        self._initialise(config.n_layer)

    def _initialise(self, n_layer: int) -> None:
        """GPT-2's: normal with deviation 0.02, and less at the end of each residual branch.

        There are 2 L branches; scaling by 1 / sqrt(2 L) keeps the sum's variance that of one.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                (nn.init.zeros_ if name.endswith("bias") else nn.init.ones_)(parameter)
            elif name.endswith("projection.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer))
            else:
                nn.init.normal_(parameter, std=0.02)

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
        x = self.token_embedding(idx) + self.position_embedding.weight[:T]  # (B, T, C)
        x = self.embedding_dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.final_norm(x)
        head = self.token_embedding if self.head is None else self.head
        logits = F.linear(x, head.weight)  # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.view(B * T, -1), targets.reshape(B * T))
        return logits, loss

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        num_tokens: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue each sequence by `max_new_tokens` tokens, one after another.

        Args:
            idx: the prompts, `(B, T)` int64, T at least 1; the last `block_size` tokens are seen.
            max_new_tokens: how many tokens to add.
            temperature: divides the logits; 0 always takes the likeliest token.
            top_k: draw among the k likeliest tokens alone; more than V means all.
            num_tokens: the tokenizer's; the ids from there on are padding, and never drawn.
            generator: where the draws come from; the default generator if None.

        Returns:
            prompts and continuations, `(B, T + max_new_tokens)` int64.
        """
        was_training = self.training
        self.eval()
        for _ in range(max_new_tokens):
            # forward() and not self(): a compiled call would compile anew for every length.
            logits, _ = self.forward(idx[:, -self.block_size :])
            logits = logits[:, -1, :num_tokens]  # (B, V), without the padding
            next_idx = sample_next(logits, temperature, top_k, generator)  # (B, 1)
            idx = torch.cat((idx, next_idx), dim=1)
        self.train(was_training)
        return idx

    def num_parameters(self) -> int:
        """How many numbers are learned; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def save_safetensors(self, path: Path, metadata: dict[str, str] | None = None) -> None:
        """Write the weights in the safetensors format, under the names they have here."""
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})

    def load_safetensors(self, content: bytes) -> None:
        """Put weights that `save_safetensors` wrote into this model, in place.

        Where this vocabulary is larger, its further rows stay as they are.

        Raises RuntimeError where a name or a shape is not this model's.
        """
        tensors = load(content)
        for name, tensor in self.vocabulary_tensors().items():
            rows = tensors.get(name)
            if rows is not None and rows.size(0) < self.vocab_size:
                tensors[name] = torch.cat((rows, tensor[rows.size(0) :].to(rows)))
        self.load_state_dict(tensors)

    def vocabulary_tensors(self) -> dict[str, Tensor]:
        """The weights that have a row for each token, `(V, C)`."""
        names = ("token_embedding.weight", "head.weight")
        return {name: tensor for name, tensor in self.state_dict().items() if name in names}


def sample_next(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the next token, `(B, 1)` int64, from logits `(B, V)`."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    # With the largest logit at 0 and the divisor above 0, a tiny temperature gives 0 or -inf to
    # the softmax, and never NaN.
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.size(-1):
        smallest_kept = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)
