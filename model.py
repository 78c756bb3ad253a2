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
from pathlib import Path

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from parameters import ModelConfig

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
        return normalised(x.float()) * self.weight


def normalised(x: Tensor) -> Tensor:
    """X / rms(x) along the last dimension."""
    if x.device.type == "cpu":
        return Normalised.apply(x)
    return F.rms_norm(x, x.shape[-1:], eps=RMS_EPSILON)  # one kernel there


class Normalised(torch.autograd.Function):
    """`normalised` for the CPU, where PyTorch's makes twice as many passes over memory."""

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


class LearnedPositions(nn.Embedding):
    """A learned vector for each position, added to the token that stands there."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` to `(B, T, C)`."""
        return x + self.weight[: x.size(1)]


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

    def forward(self, qk: Tensor) -> Tensor:
        """Queries and keys together, `(2, B, H, T, D)`, to the same shape, in float32."""
        weight = torch.stack((self.query_norm.weight, self.key_norm.weight))  # (2, D)
        x = normalised(qk.float()) * weight[:, None, None, None, :]
        T = x.size(-2)
        first, second = x.chunk(2, dim=-1)
        return x * self.cos[:T] + torch.cat((-second, first), dim=-1) * self.sin[:T]


class CausalSelfAttention(nn.Module):
    """Each position gathers from itself and those before it (arxiv.org/abs/1706.03762)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_head = config.n_head
        is_modern = config.architecture == "modern"
        # GPT-2 drops attention weights too, which no fast kernel for the CPU can do.
        self.dropout = 0.0 if is_modern else config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.queries_and_keys = NormedRotary(config) if is_modern else nn.Identity()
        self.projection = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` to `(B, T, C)`; a position sees itself and what precedes it."""
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        (q, k), v = self.queries_and_keys(qkv[:2]), qkv[2]  # each (B, H, T, D)
        # SDPA knows nothing of eval(): dropout must be switched off by hand.
        y = attend(q, k, v, self.dropout if self.training else 0.0)
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
        hidden = gated_width(config.n_embd)
        self.gate = nn.Linear(config.n_embd, hidden, bias=False)
        self.expand = nn.Linear(config.n_embd, hidden, bias=False)
        self.activation = create_activation(config)
        self.projection = nn.Linear(hidden, config.n_embd, bias=False)
        self.residual_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` to `(B, T, C)`; positions do not see each other."""
        x = self.activation(self.gate(x)) * self.expand(x)
        return self.residual_dropout(self.projection(x))


def gated_width(n_embd: int) -> int:
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
        is_modern = config.architecture == "modern"
        self.position_embedding = (
            nn.Identity() if is_modern else LearnedPositions(config.block_size, config.n_embd)
        )
        self.embedding_dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = create_norm(config, config.n_embd)
        # A tied head (arxiv.org/abs/1608.05859) has no tensor of its own: nothing to keep in
        # step when the weights are loaded, moved or saved.
        self.head = None if config.tie_weights else nn.Linear(config.n_embd, vocab_size, bias=False)
        deviation = modern_deviation if is_modern else gpt2_deviation
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
        x = self.position_embedding(self.token_embedding(idx))  # (B, T, C)
        x = self.embedding_dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.final_norm(x)
        head = self.token_embedding if self.head is None else self.head
        logits = F.linear(x, head.weight)  # (B, T, V)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.float().view(B * T, -1), targets.reshape(B * T))
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

    def block_matrices(self) -> dict[str, Tensor]:
        """The matrices of the blocks by name, `(outputs, inputs)` each: what Muon is for."""
        named = self.blocks.named_parameters(prefix="blocks")
        return {name: parameter for name, parameter in named if parameter.dim() == 2}

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


def gpt2_deviation(name: str, parameter: Tensor, config: ModelConfig) -> float:
    """GPT-2's first weights: 0.02, and less at the end of each of the 2 L residual branches.

    Scaling by 1 / sqrt(2 L) keeps the variance of the branches' sum that of one.
    """
    return 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("projection.weight") else 0.02


def modern_deviation(name: str, parameter: Tensor, config: ModelConfig) -> float:
    """The first weights of `modern`: what ends a branch, and a head of its own, begin at zero.

    So the first steps see the tokens alone (arxiv.org/abs/2203.03466 has the reasons), and what
    stands before is scaled to its inputs.
    """
    if name.endswith(("projection.weight", "head.weight")):
        return 0.0
    if name.endswith("embedding.weight"):
        return 0.02 if config.tie_weights else 0.2
    return 0.7 / math.sqrt(parameter.size(1))


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
