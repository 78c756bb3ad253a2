"""PyTorch's decoding: sampling and the KV cache, on any device.

It defines what is right: decode_numba.py must generate the same tokens.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine import SamplingParams
from model import LanguageModel
from parameters import NGRAM_REACH

# ----------------------------------------------------------------------------------------------
# Sampling


def sample_token(
    logits: Tensor, draw: Tensor, sampling: SamplingParams, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample a token for each row of the logits, `(B, V)`.

    `draw`, `(B,)`, is uniform in [0, 1). `seen`, `(B, V)` bool, marks the tokens of the text, for
    the repetition penalty only. Returns the tokens, `(B, 1)` int64, and their log-probabilities
    before `sampling`, `(B, 1)`.
    """
    log_probs = logits.log_softmax(dim=-1)
    if seen is not None:
        logits = apply_repetition_penalty(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        token = logits.argmax(dim=-1, keepdim=True)
    else:
        token = invert_cdf(filter_logits(logits, sampling).softmax(dim=-1), draw)
    return token, log_probs.gather(-1, token)


def filter_logits(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Apply temperature, above 0, top-k, top-p and min-p to the logits, `(B, V)`: -inf is cut."""
    logits = apply_temperature(logits, sampling.temperature)
    if sampling.top_k is not None:
        logits = filter_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = filter_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = filter_min_p(logits, sampling.min_p)
    return logits


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Penalize the tokens in `seen`: arxiv.org/abs/1909.05858, section 4.1."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide the logits by the temperature, however small, so that their softmax is never NaN."""
    temperature = max(temperature, torch.finfo(logits.dtype).tiny)
    return (logits - logits.amax(dim=-1, keepdim=True)) / temperature


def filter_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k most likely tokens and any that tie with the last; set the others to -inf."""
    smallest_kept = logits.topk(min(k, logits.size(-1))).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def filter_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens with total probability p (arxiv.org/abs/1904.09751)."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # of more likely tokens; first: 0
    too_many = (before >= p) & (before > 0)  # the most likely token stays, however small p is
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, too_many)
    return logits.masked_fill(dropped, -math.inf)


def filter_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least p times as likely as the most likely (arxiv.org/abs/2407.01082)."""
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(p), -math.inf)


def invert_cdf(probabilities: Tensor, draw: Tensor) -> Tensor:
    """Return the token at which the cumulative distribution passes `draw`, `(B, 1)` int64.

    One uniform number per row and no generator, so that a row depends neither on the other rows
    nor on the device.
    """
    cdf = probabilities.cumsum(dim=-1)  # (B, V)
    # Rounding must not carry a draw past the end, to tokens of probability 0.
    target = draw[:, None].clamp(max=1 - 2**-20) * cdf[:, -1:]
    return (cdf <= target).sum(dim=-1, keepdim=True)


# ----------------------------------------------------------------------------------------------
# KV cache and decoding


class LayerCache(NamedTuple):
    """One layer's part of the KV cache."""

    keys: Tensor  # (B, H, T, D)
    values: Tensor  # (B, H, T, D)
    mask: Tensor  # (t, T): 0 at positions to attend to, -inf elsewhere

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Append keys and values at `positions`, then attend to all of the cache."""
        self.keys.index_copy_(2, positions, k)
        self.values.index_copy_(2, positions, v)
        return F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=self.mask)


class KVCache:
    """Ids, keys and values of `rows` texts, B, allocated for a full context at once."""

    def __init__(self, model: LanguageModel, rows: int):
        weight, n_head = model.token_embedding.weight, model.blocks[0].attention.n_head
        T, C = model.block_size, weight.size(1)
        shape = (rows, n_head, T, C // n_head)  # (B, H, T, D)
        like = {"dtype": weight.dtype, "device": weight.device}
        self.keys = [torch.zeros(shape, **like) for _ in model.blocks]
        self.values = [torch.zeros(shape, **like) for _ in model.blocks]
        self.positions = torch.arange(T, device=weight.device)
        # Plus 1, after zeros for no token: as `model.NgramEmbedding` reads them.
        self.ids = torch.zeros((rows, NGRAM_REACH + T), dtype=torch.int64, device=weight.device)
        self.reach = torch.arange(NGRAM_REACH, device=weight.device)

    def append_tokens(self, idx: Tensor, positions: Tensor) -> Tensor:
        """Append `idx`, `(B, t)`, and return it as `NgramEmbedding` reads it."""
        self.ids.index_copy_(1, positions + NGRAM_REACH, idx + 1)
        return self.ids[:, torch.cat((positions[:1] + self.reach, positions + NGRAM_REACH))]

    def get_layers(self, positions: Tensor) -> list[LayerCache]:
        """Return each layer's part, for new tokens at `positions`, `(t,)`."""
        is_future = self.positions > positions[:, None]  # (t, T), later or not filled yet
        mask = torch.zeros_like(is_future, dtype=self.keys[0].dtype)
        mask = mask.masked_fill(is_future, -math.inf)
        return [LayerCache(*pair, mask) for pair in zip(self.keys, self.values, strict=True)]


class TorchDecoder:
    """Continues B texts by PyTorch: see `engine.Decoder`. The model is in eval mode meanwhile."""

    tokens_per_call = 1

    def __init__(self, model: LanguageModel, prompt: np.ndarray, sampling: SamplingParams):
        self.model, self.sampling = model, sampling
        self.device = model.token_embedding.weight.device
        self.cache = KVCache(model, len(prompt))
        self.seen = None  # (B, num_tokens) bool
        if sampling.repetition_penalty != 1:
            seen = np.zeros((len(prompt), model.vocab_size), dtype=bool)
            np.put_along_axis(seen, prompt, True, axis=1)
            self.seen = torch.from_numpy(seen[:, : model.num_tokens]).to(self.device)

    @torch.inference_mode()
    def decode(
        self, ids: np.ndarray, position: int, draws: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Generate a token for each row of `draws`: see `engine.Decoder`."""
        was_training = self.model.training
        if was_training:
            self.model.eval()
        try:
            tokens, log_probs = self._decode(
                torch.tensor(ids, device=self.device),
                self.cache.positions[position : position + ids.shape[1]],
                torch.tensor(draws, device=self.device),
            )
        finally:
            if was_training:
                self.model.train()
        return tokens.cpu().numpy(), log_probs.float().cpu().numpy()

    def _decode(self, idx: Tensor, positions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        tokens, log_probs = [], []
        for draw in draws:
            logits = self.model.compute_next_logits(idx, positions, self.cache)
            logits = logits[:, : self.model.num_tokens]
            idx, log_prob = sample_token(logits, draw, self.sampling, self.seen)  # (B, 1)
            positions = positions[-1:] + 1
            if self.seen is not None:
                self.seen.scatter_(1, idx, True)
            tokens.append(idx)
            log_probs.append(log_prob)
        return torch.cat(tokens, dim=1), torch.cat(log_probs, dim=1)


class GraphDecoder(TorchDecoder):
    """A `TorchDecoder` on a CUDA device: a step is recorded once and replayed as one CUDA graph.

    A small model's step is a hundred kernels of a few microseconds each, and a CPU takes longer to
    start them one by one (docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
    """

    tokens_per_call = 16  # each call waits for the GPU once

    def __init__(self, model: LanguageModel, prompt: np.ndarray, sampling: SamplingParams):
        super().__init__(model, prompt, sampling)
        B = len(prompt)
        # The graph reads and writes these.
        self.idx = torch.zeros((B, 1), dtype=torch.int64, device=self.device)
        self.log_probs = torch.zeros((B, 1), device=self.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.draw = torch.zeros(B, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _decode(self, idx: Tensor, positions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        tokens, log_probs = [], []
        if idx.size(1) > 1:  # prefill, and the first token
            idx, log_prob = super()._decode(idx, positions, draws[:1])
            tokens, log_probs = [idx], [log_prob]
            positions, draws = positions[-1:] + 1, draws[1:]
        if len(draws) and self.graph is None:
            self.graph = self._record(idx, positions)
        self.idx.copy_(idx)
        self.position.copy_(positions[-1:])
        for draw in draws:
            self.draw.copy_(draw)
            self.graph.replay()
            tokens.append(self.idx.clone())
            log_probs.append(self.log_probs.clone())
        return torch.cat(tokens, dim=1), torch.cat(log_probs, dim=1)

    def _step(self) -> None:
        """Generate the token after `idx`, and advance."""
        logits = self.model.compute_next_logits(self.idx, self.position, self.cache)
        logits = logits[:, : self.model.num_tokens]
        token, log_prob = sample_token(logits, self.draw, self.sampling, self.seen)
        if self.seen is not None:
            self.seen.scatter_(1, token, True)
        self.idx.copy_(token)
        self.log_probs.copy_(log_prob)
        self.position.add_(1)

    def _record(self, idx: Tensor, position: Tensor) -> torch.cuda.CUDAGraph:
        """Record a step. Steps are run before, as PyTorch requires: the next one repeats them."""
        seen = None if self.seen is None else self.seen.clone()
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.idx.copy_(idx)
                    self.position.copy_(position[-1:])
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # PyTorch's own stream is on the first device that recorded a graph.
            with torch.cuda.graph(graph, stream=stream):
                self._step()
        if seen is not None:
            self.seen.copy_(seen)
        return graph


class TorchEngine:
    """Runs a model by PyTorch, on the model's device: see `engine.Engine`."""

    name = "torch"

    def __init__(self, model: LanguageModel):
        self.model, self.block_size = model, model.block_size

    def create_decoder(self, prompt: np.ndarray, sampling: SamplingParams) -> TorchDecoder:
        """Create a decoder of the texts that begin with `prompt`, `(B, T)` int64."""
        is_cuda = self.model.token_embedding.weight.device.type == "cuda"
        return (GraphDecoder if is_cuda else TorchDecoder)(self.model, prompt, sampling)
