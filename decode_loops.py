"""Decoding in plain loops: what model.py computes, one number at a time, compiled by numba.

Generation is a product of a row of numbers and a matrix, thousands of times a second. At this size
PyTorch spends nine tenths of the time between its operations. `decode`, at the end of this file,
is one function in machine code: it reads the weights once per token, samples, and continues with
the next token.

The dimensions are those of model.py, and two more:

    F  hidden: the width of the MLP            M  rows: the tokens of one pass through the model

The rows are one token of each of B texts (decode), or consecutive tokens of one text (prefill). A
matrix is `(outputs, inputs)`, as in PyTorch: each output is the dot product of the inputs with a
row of the matrix, which is contiguous in memory.

Several threads call `decode` at the same time. Each computes a share of the heads and of the
outputs of each matrix, and waits for the others before it reads what they have computed. Any thread
computes an output in the same order of operations, so the text does not depend on their number.

These functions allocate nothing and check no index: decode_numba.py prepares the arrays.
"""

import math
from typing import NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic
from numpy import float32

OPTIONS = {"nogil": True, "error_model": "numpy"}  # division by zero gives inf, as in PyTorch
INNER = {**OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # faster to compile
# These flags of LLVM let the compiler reorder a sum, so that it adds 16 terms at once, and assume
# that no number is infinite: the functions that compare with -inf do without. They leave divisions
# exact, so that the same number comes out in a group of 16 and in the rest of a row.
FAST_MATH = {"reassoc", "contract", "nnan", "ninf", "nsz"}
fast = numba.njit(fastmath=FAST_MATH, **INNER)
exact = numba.njit(**INNER)

SILU, GELU_TANH, GELU = 0, 1, 2
CHUNK = 128  # tokens of a prompt that are computed at the same time


# ----------------------------------------------------------------------------------------------
# The arrays. All numbers are float32 unless stated otherwise.


class Linear(NamedTuple):
    """The matrices of one kind in all layers: y = (x @ weight.T) * scale + bias."""

    weight: np.ndarray  # (L, outputs, inputs), float32, or int8 from -127 to 127
    scale: np.ndarray  # (L, outputs): ones, unless the weights are int8
    bias: np.ndarray  # (L, outputs): zeros if the model has none


class Weights(NamedTuple):
    """A model. An array that its architecture does not have is empty.

    `speedrun` counts as modern, and has n-gram embeddings.
    """

    is_modern: bool
    activation: int  # SILU, GELU_TANH or GELU
    token_embedding: np.ndarray  # (V, C)
    ngram_embedding: np.ndarray  # (R, C): speedrun
    ngram_factors: np.ndarray  # (N, N + 1) int64: `parameters.NGRAM_FACTORS`
    position_embedding: np.ndarray  # (T, C): gpt2
    cos: np.ndarray  # (T, D / 2), of the rotary angles: modern
    sin: np.ndarray  # (T, D / 2)
    attention_norm: np.ndarray  # (L, 2, C): weight and bias
    qkv: Linear  # C to 3 C: queries, keys, values; each H x D
    query_key_norm: np.ndarray  # (L, 2, D): the queries' weight and the keys': modern
    projection: Linear  # C to C
    mlp_norm: np.ndarray  # (L, 2, C)
    gate: Linear  # C to F: modern
    up: Linear  # C to F
    down: Linear  # F to C
    final_norm: np.ndarray  # (2, C)
    head: np.ndarray  # (V, C), V without padding ids


class Cache(NamedTuple):
    """The keys, values and ids of B texts."""

    keys: np.ndarray  # (B, L, H, T, D)
    values: np.ndarray  # (B, L, H, T, D)
    ids: np.ndarray  # (B, N + T) int64: plus 1, after zeros, which stand for no token


class Buffers(NamedTuple):
    """Memory for intermediate results; with a dimension `threads`, each thread has its own."""

    texts: np.ndarray  # (threads, M) int64: which text each row belongs to
    positions: np.ndarray  # (threads, M) int64: the row's position in the context
    x: np.ndarray  # (threads, M, C): the residual stream, the same in each thread
    normed: np.ndarray  # (threads, M, C)
    qkv: np.ndarray  # (M, 3 C)
    scores: np.ndarray  # (threads, T): of one query
    attended: np.ndarray  # (M, C)
    branch: np.ndarray  # (M, C): what attention or MLP adds to the residual stream
    gate: np.ndarray  # (M, F)
    hidden: np.ndarray  # (M, F)
    logits: np.ndarray  # (B, V)
    candidates: np.ndarray  # (threads, V): the logits of one text while they are filtered
    heap: np.ndarray  # (threads, V) int64: token ids


class Sampling(NamedTuple):
    """`engine.SamplingParams` in numbers."""

    repetition_penalty: float32
    temperature: float32
    top_k: int  # V: no filter
    top_p: float32
    min_log_p: float32  # log(min_p); -inf: no filter


class Team(NamedTuple):
    """The threads that run one call, and the one that this copy belongs to."""

    rank: int
    size: int
    arrived: np.ndarray  # int64, element 0: how often any thread has arrived at a barrier
    expected: np.ndarray  # int64, element 0: the arrivals that release this thread


# ----------------------------------------------------------------------------------------------
# Dot products


@fast
def multiply_row(x, weight, y, start, stop):
    """Compute y[start:stop] = weight[start:stop] @ x. `x` is `(K,)`, and `weight` `(N, K)`.

    Four rows at a time, from the four quarters of the range: reading the weights bounds this loop,
    and a processor prefetches four long sequences faster than one, or than four short ones.
    """
    quarter = (stop - start) // 4
    for n in range(start, start + quarter):
        w0, w1 = weight[n], weight[n + quarter]
        w2, w3 = weight[n + 2 * quarter], weight[n + 3 * quarter]
        s0 = s1 = s2 = s3 = float32(0)
        for k in range(len(x)):
            s0 += x[k] * float32(w0[k])
            s1 += x[k] * float32(w1[k])
            s2 += x[k] * float32(w2[k])
            s3 += x[k] * float32(w3[k])
        y[n], y[n + quarter], y[n + 2 * quarter], y[n + 3 * quarter] = s0, s1, s2, s3
    for n in range(start + 4 * quarter, stop):
        row, total = weight[n], float32(0)
        for k in range(len(x)):
            total += x[k] * float32(row[k])
        y[n] = total


@fast
def multiply_rows(x, weight, y, start, stop):
    """Compute y[:, start:stop] = x @ weight[start:stop].T. `x` is `(M, K)`, and `weight` `(N, K)`.

    In tiles of 4 rows by 4 outputs, whose 16 sums stay in registers: 8 numbers are loaded for 16
    products, where one dot product after another loads 32.
    """
    M, K = x.shape
    end = start + (stop - start) // 4 * 4 if M >= 4 else start
    for n in range(start, end, 4):
        w0, w1, w2, w3 = weight[n], weight[n + 1], weight[n + 2], weight[n + 3]
        for m in range(0, M - 3, 4):
            x0, x1, x2, x3 = x[m], x[m + 1], x[m + 2], x[m + 3]
            y0, y1, y2, y3 = y[m], y[m + 1], y[m + 2], y[m + 3]
            s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = float32(0)
            s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = float32(0)
            for k in range(K):
                a0, a1, a2, a3 = x0[k], x1[k], x2[k], x3[k]
                b0, b1, b2, b3 = float32(w0[k]), float32(w1[k]), float32(w2[k]), float32(w3[k])
                s00, s01, s02, s03 = s00 + a0 * b0, s01 + a0 * b1, s02 + a0 * b2, s03 + a0 * b3
                s10, s11, s12, s13 = s10 + a1 * b0, s11 + a1 * b1, s12 + a1 * b2, s13 + a1 * b3
                s20, s21, s22, s23 = s20 + a2 * b0, s21 + a2 * b1, s22 + a2 * b2, s23 + a2 * b3
                s30, s31, s32, s33 = s30 + a3 * b0, s31 + a3 * b1, s32 + a3 * b2, s33 + a3 * b3
            y0[n], y0[n + 1], y0[n + 2], y0[n + 3] = s00, s01, s02, s03
            y1[n], y1[n + 1], y1[n + 2], y1[n + 3] = s10, s11, s12, s13
            y2[n], y2[n + 1], y2[n + 2], y2[n + 3] = s20, s21, s22, s23
            y3[n], y3[n + 1], y3[n + 2], y3[n + 3] = s30, s31, s32, s33
    tiled = M // 4 * 4
    for m in range(M):  # the rows and outputs that fill no tile
        multiply_row(x[m], weight, y[m], end if m < tiled else start, stop)


@fast
def apply_linear(x, linear, layer, y, start, stop):
    """Compute outputs `start` to `stop` of a linear layer: `(M, inputs)` to `(M, outputs)`."""
    multiply_rows(x, linear.weight[layer], y, start, stop)
    scale, bias = linear.scale[layer], linear.bias[layer]
    for m in range(len(x)):
        row = y[m]
        for n in range(start, stop):
            row[n] = row[n] * scale[n] + bias[n]


@fast
def average_values(probabilities, values, y):
    """Compute y = probabilities @ values: `(t,)` and the first t of `(T, D)` to `(D,)`.

    Four positions at a time, so that y is loaded and stored a quarter as often.
    """
    t, D = len(probabilities), len(y)
    for d in range(D):
        y[d] = 0
    for i in range(0, t - 3, 4):
        a, b = probabilities[i], probabilities[i + 1]
        c, e = probabilities[i + 2], probabilities[i + 3]
        v0, v1, v2, v3 = values[i], values[i + 1], values[i + 2], values[i + 3]
        for d in range(D):
            y[d] += a * v0[d] + b * v1[d] + c * v2[d] + e * v3[d]
    for i in range(t // 4 * 4, t):
        a, v0 = probabilities[i], values[i]
        for d in range(D):
            y[d] += a * v0[d]


# ----------------------------------------------------------------------------------------------
# Functions of single numbers and rows


@fast
def compute_exp(x):
    """Compute e^x, with a relative error below 1e-6, in operations that apply to 16 x at once.

    e^x = 2^n e^r, n a whole number and r in ±ln(2) / 2. The Taylor series gives e^r, and n is the
    exponent of a float32. x is clamped to ±87, as e^87 is nearly the largest float32.
    """
    x = min(max(x, float32(-87)), float32(87))
    n = np.floor(x * float32(1 / math.log(2)) + float32(0.5))
    r = x - n * float32(math.log(2))
    y = float32(1 / 720)
    y = y * r + float32(1 / 120)
    y = y * r + float32(1 / 24)
    y = y * r + float32(1 / 6)
    y = y * r + float32(1 / 2)
    y = y * r + float32(1)
    y = y * r + float32(1)
    exponent = np.int32((np.int32(n) + np.int32(127)) << np.int32(23))
    return y * exponent.view(float32)


@fast
def compute_erfc(z):
    """Compute 1 - erf(z) for z >= 0, within 2e-7: Abramowitz and Stegun, formula 7.1.26."""
    t = float32(1) / (float32(1) + float32(0.3275911) * z)
    y = float32(1.061405429)
    y = y * t - float32(1.453152027)
    y = y * t + float32(1.421413741)
    y = y * t - float32(0.284496736)
    y = y * t + float32(0.254829592)
    return y * t * compute_exp(-z * z)


@fast
def activate(x, kind):
    """Apply the activation to `(n,)`, in place."""
    if kind == SILU:
        for i in range(len(x)):
            x[i] = x[i] / (float32(1) + compute_exp(-x[i]))
    elif kind == GELU_TANH:  # 0.5 x (1 + tanh z) = x / (1 + e^(-2 z))
        for i in range(len(x)):
            z = float32(math.sqrt(2 / math.pi)) * (x[i] + float32(0.044715) * x[i] * x[i] * x[i])
            x[i] = x[i] / (float32(1) + compute_exp(float32(-2) * z))
    else:  # x times the normal distribution's probability of at most x
        for i in range(len(x)):
            tail = float32(0.5) * compute_erfc(abs(x[i]) * float32(math.sqrt(0.5)))
            x[i] = x[i] * (float32(1) - tail if x[i] > 0 else tail)


@fast
def normalize(x, norm, is_modern, y):
    """Compute the norm of each row, `(M, C)`: RMSNorm if modern, LayerNorm otherwise."""
    C, weight, bias = x.shape[1], norm[0], norm[1]
    epsilon = float32(1e-6) if is_modern else float32(1e-5)
    for m in range(len(x)):
        row, normed = x[m], y[m]
        mean = square = float32(0)
        if not is_modern:
            for c in range(C):
                mean += row[c]
            mean /= float32(C)
        for c in range(C):
            square += (row[c] - mean) * (row[c] - mean)
        scale = float32(1) / np.sqrt(square / float32(C) + epsilon)
        for c in range(C):
            normed[c] = (row[c] - mean) * scale * weight[c] + bias[c]


@fast
def normalize_and_rotate(x, weight, cos, sin):
    """Apply RMSNorm and the rotary embedding to a query or key, `(D,)`, in place."""
    D = len(x)
    square = float32(0)
    for d in range(D):
        square += x[d] * x[d]
    scale = float32(1) / np.sqrt(square / float32(D) + float32(1e-6))
    for d in range(D // 2):  # channels d and d + D / 2 are the coordinates of a point
        a, b = x[d] * scale * weight[d], x[d + D // 2] * scale * weight[d + D // 2]
        x[d] = a * cos[d] - b * sin[d]
        x[d + D // 2] = b * cos[d] + a * sin[d]


@fast
def apply_softmax(scores, factor):
    """Replace scores, `(t,)`, by the softmax of factor * scores."""
    largest = scores[0]
    for i in range(len(scores)):
        largest = max(largest, scores[i])
    total = float32(0)
    for i in range(len(scores)):
        scores[i] = compute_exp((scores[i] - largest) * factor)
        total += scores[i]
    for i in range(len(scores)):
        scores[i] /= total


# ----------------------------------------------------------------------------------------------
# The transformer


@exact
def get_share(size, unit, team):
    """Return the range of `size` outputs, in whole units, that this thread computes."""
    units = (size + unit - 1) // unit
    start = (units * team.rank // team.size) * unit
    stop = (units * (team.rank + 1) // team.size) * unit
    return min(start, size), min(stop, size)


@exact
def get_heads(keys, team):
    """Return the range of heads that this thread computes.

    In groups of 4 if D is not a multiple of 4, so that the tiles of `multiply_rows` are the same
    for any number of threads.
    """
    return get_share(keys.shape[2], 1 if keys.shape[4] % 4 == 0 else 4, team)


@fast
def embed(ids, token_embedding, x):
    """Set the rows of x, `(M, C)`, to the embeddings of the tokens `ids`, `(M,)`."""
    for m in range(len(ids)):
        row, embedding = x[m], token_embedding[ids[m]]
        for c in range(len(row)):
            row[c] = embedding[c]


@fast
def append_ids(ids, texts, positions, cache, N):
    """Append the tokens `ids`, `(M,)`, to the cache."""
    for m in range(len(ids)):
        cache.ids[texts[m], N + positions[m]] = ids[m] + 1


@fast
def add_ngrams(texts, positions, cache, ngram_embedding, factors, x):
    """Add to the rows of x, `(M, C)`, the embeddings of the n-grams that end there."""
    for m in range(len(x)):
        row, end = x[m], positions[m] + factors.shape[1]
        recent = cache.ids[texts[m], positions[m] : end]
        for n in range(len(factors)):
            total = 0
            for i in range(len(recent)):
                total += recent[i] * factors[n, i]
            embedding = ngram_embedding[total % len(ngram_embedding)]
            for c in range(len(row)):
                row[c] += embedding[c]


@fast
def add_positions(positions, position_embedding, x):
    """Add to the rows of x, `(M, C)`, the embeddings of their positions, `(M,)`."""
    for m in range(len(x)):
        row, embedding = x[m], position_embedding[positions[m]]
        for c in range(len(row)):
            row[c] += embedding[c]


@fast
def rotate_queries_and_keys(qkv, norm, cos, sin, positions, start, stop):
    """Apply norm and rotary embedding to the heads `start` to `stop` of qkv, `(M, 3 C)`."""
    C, D = qkv.shape[1] // 3, norm.shape[1]
    for m in range(len(qkv)):
        row, t = qkv[m], positions[m]
        for c in range(start * D, stop * D, D):
            normalize_and_rotate(row[c : c + D], norm[0], cos[t], sin[t])
            normalize_and_rotate(row[C + c : C + c + D], norm[1], cos[t], sin[t])


@fast
def attend(qkv, cache, layer, texts, positions, scores, y, start, stop):
    """Compute attention in the heads `start` to `stop`: qkv, `(M, 3 C)`, to y, `(M, C)`."""
    D = cache.keys.shape[4]
    C, M = y.shape[1], len(qkv)
    for m in range(M):  # append keys and values to the cache
        row = qkv[m]
        for h in range(start, stop):
            key = cache.keys[texts[m], layer, h, positions[m]]
            value = cache.values[texts[m], layer, h, positions[m]]
            for d in range(D):
                key[d] = row[C + h * D + d]
                value[d] = row[2 * C + h * D + d]
    factor = float32(1 / math.sqrt(D))
    for m in range(M):  # each row attends to its own position and those before it
        row, result = qkv[m], y[m]
        t = positions[m] + 1
        for h in range(start, stop):
            q, output = row[h * D : h * D + D], result[h * D : h * D + D]
            multiply_row(q, cache.keys[texts[m], layer, h], scores, 0, t)
            apply_softmax(scores[:t], factor)
            average_values(scores[:t], cache.values[texts[m], layer, h], output)


@fast
def apply_activation(hidden, gate, kind, is_gated, start, stop):
    """Activate the channels `start` to `stop` of hidden, `(M, F)`; if gated, times the gate's."""
    for m in range(len(hidden)):
        row, factors = hidden[m, start:stop], gate[m, start:stop]
        activate(factors if is_gated else row, kind)
        if is_gated:
            for f in range(len(row)):
                row[f] *= factors[f]


@fast
def add(x, branch):
    """Add a branch to the residual stream, both `(M, C)`."""
    for m in range(len(x)):
        row, new = x[m], branch[m]
        for c in range(len(row)):
            row[c] += new[c]


@fast
def run_blocks(weights, cache, buffers, ids, team):
    """Run M tokens through all blocks, and append their keys and values to the cache.

    This thread's `buffers.texts` and `buffers.positions` have the place of each. Leaves the
    residual stream in its `buffers.x`.
    """
    M, L, H = len(ids), cache.keys.shape[1], cache.keys.shape[2]
    D = cache.keys.shape[4]
    C, F = H * D, buffers.hidden.shape[1]
    texts, positions = buffers.texts[team.rank], buffers.positions[team.rank]
    x, normed, scores = buffers.x[team.rank, :M], buffers.normed[team.rank, :M], buffers.scores
    qkv, attended = buffers.qkv[:M], buffers.attended[:M]
    gate, hidden = buffers.gate[:M], buffers.hidden[:M]
    branch = buffers.branch[:M]
    # The outputs of this thread, in whole cache lines of 16 numbers, and its heads.
    c0, c1 = get_share(C, 16, team)
    f0, f1 = get_share(F, 16, team)
    h0, h1 = get_heads(cache.keys, team)

    embed(ids, weights.token_embedding, x)
    if len(weights.ngram_embedding) > 0:
        append_ids(ids, texts, positions, cache, len(weights.ngram_factors))
        add_ngrams(texts, positions, cache, weights.ngram_embedding, weights.ngram_factors, x)
    if not weights.is_modern:
        add_positions(positions, weights.position_embedding, x)
    for layer in range(L):
        normalize(x, weights.attention_norm[layer], weights.is_modern, normed)
        for start in range(0, 3 * C, C):  # queries, keys, values
            apply_linear(normed, weights.qkv, layer, qkv, start + h0 * D, start + h1 * D)
        if weights.is_modern:
            norm = weights.query_key_norm[layer]
            rotate_queries_and_keys(qkv, norm, weights.cos, weights.sin, positions, h0, h1)
        attend(qkv, cache, layer, texts, positions, scores[team.rank], attended, h0, h1)
        wait_for_all(team)  # all heads
        apply_linear(attended, weights.projection, layer, branch, c0, c1)
        wait_for_all(team)
        add(x, branch)

        normalize(x, weights.mlp_norm[layer], weights.is_modern, normed)
        apply_linear(normed, weights.up, layer, hidden, f0, f1)
        if weights.is_modern:
            apply_linear(normed, weights.gate, layer, gate, f0, f1)
        apply_activation(hidden, gate, weights.activation, weights.is_modern, f0, f1)
        wait_for_all(team)
        apply_linear(hidden, weights.down, layer, branch, c0, c1)
        wait_for_all(team)
        add(x, branch)


@fast
def compute_logits(x, norm, head, is_modern, normed, logits, team):
    """Compute the logits, `(B, V)`, of the token after each row of the residual stream."""
    normalize(x, norm, is_modern, normed)
    start, stop = get_share(len(head), 16, team)
    multiply_rows(normed, head, logits, start, stop)


@fast
def copy_text(cache, source, target, length, start, stop):
    """Copy the first ids, keys and values of one text to another, in heads `start` to `stop`."""
    N = cache.ids.shape[1] - cache.keys.shape[3]
    for t in range(N, N + length):
        cache.ids[target, t] = cache.ids[source, t]
    for layer in range(cache.keys.shape[1]):
        for h in range(start, stop):
            for t in range(length):
                for d in range(cache.keys.shape[4]):
                    cache.keys[target, layer, h, t, d] = cache.keys[source, layer, h, t, d]
                    cache.values[target, layer, h, t, d] = cache.values[source, layer, h, t, d]


@exact
def is_equal(first, second):
    """Return whether two sequences of ids, `(t,)`, are equal."""
    for i in range(len(first)):
        if first[i] != second[i]:
            return False
    return True


# ----------------------------------------------------------------------------------------------
# Sampling: the steps of `decode_torch.sample_token`, for one text


@exact
def compute_probability(logit):
    """Compute e^logit for logit <= 0: a probability, not normalized. 0 below e^-87."""
    return compute_exp(logit) if logit > float32(-87) else float32(0)


@exact
def find_largest(logits):
    """Return the id of the largest logit, the first of several."""
    best = 0
    for v in range(len(logits)):
        if logits[v] > logits[best]:
            best = v
    return best


@exact
def sum_probabilities(logits):
    """Return the sum of e^logit over `(V,)`."""
    total = float32(0)
    for v in range(len(logits)):
        total += compute_probability(logits[v])
    return total


@exact
def is_before(logits, v, w):
    """Return whether token v precedes w in descending order of the logits, then of the ids."""
    return logits[v] > logits[w] or (logits[v] == logits[w] and v < w)


@exact
def sift_down(logits, heap, i, size):
    """Move entry i of a binary heap down to its place."""
    while 2 * i + 1 < size:
        child = 2 * i + 1
        if child + 1 < size and is_before(logits, heap[child + 1], heap[child]):
            child += 1
        if is_before(logits, heap[i], heap[child]):
            return
        heap[i], heap[child] = heap[child], heap[i]
        i = child


@exact
def build_heap(logits, heap):
    """Order the ids in a heap: the first is the most likely."""
    for v in range(len(heap)):
        heap[v] = v
    for i in range(len(heap) // 2 - 1, -1, -1):
        sift_down(logits, heap, i, len(heap))


@exact
def pop(logits, heap, size):
    """Remove the first of the `size` ids in a heap, and return it."""
    first = heap[0]
    heap[0] = heap[size - 1]
    sift_down(logits, heap, np.int64(0), size - 1)  # a literal 0 would compile it once more
    return first


@exact
def filter_top_k(logits, heap, k):
    """Keep the k most likely tokens and any that tie with the last; set the others to -inf."""
    build_heap(logits, heap)
    last = 0
    for i in range(k):
        last = pop(logits, heap, len(heap) - i)
    smallest = logits[last]
    for v in range(len(logits)):
        if logits[v] < smallest:
            logits[v] = -np.inf


@exact
def filter_top_p(logits, heap, p):
    """Keep the fewest most likely tokens with total probability p; set the others to -inf."""
    build_heap(logits, heap)
    total, cdf, last = sum_probabilities(logits), 0.0, heap[0]
    for i in range(len(heap)):
        token = pop(logits, heap, len(heap) - i)
        probability = compute_probability(logits[token]) / total
        cdf += probability
        before = float32(cdf) - probability
        if before >= p and before > 0:
            break
        last = token
    for v in range(len(logits)):
        if is_before(logits, last, v):
            logits[v] = -np.inf


@exact
def invert_cdf(logits, draw):
    """Return the token at which the cumulative distribution passes `draw`; overwrites logits."""
    total, cdf = sum_probabilities(logits), 0.0
    for v in range(len(logits)):
        cdf += compute_probability(logits[v]) / total
        logits[v] = cdf
    target = min(draw, float32(1 - 2**-20)) * logits[-1]
    token = 0
    while logits[token] <= target:
        token += 1
    return token


@exact
def choose_token(logits, heap, draw, sampling):
    """Sample a token from the logits, `(V,)`, which are overwritten."""
    best = find_largest(logits)
    if sampling.temperature == 0:
        return best
    largest = logits[best]
    for v in range(len(logits)):
        logits[v] = (logits[v] - largest) / sampling.temperature
    if sampling.top_k < len(logits):
        filter_top_k(logits, heap, sampling.top_k)
    if sampling.top_p < 1:
        filter_top_p(logits, heap, sampling.top_p)
    for v in range(len(logits)):
        if logits[v] < sampling.min_log_p:
            logits[v] = -np.inf
    return invert_cdf(logits, draw)


@exact
def sample_token(logits, seen, draw, sampling, candidates, heap):
    """Sample a token from the logits, `(V,)`, and mark it in `seen`, `(V,)` bool.

    `draw` is uniform in [0, 1); `candidates` and `heap`, `(V,)`, are memory. Returns the token and
    its log-probability before `sampling`.
    """
    largest = logits[find_largest(logits)]
    for v in range(len(logits)):
        candidates[v] = logits[v] - largest
    log_total = np.log(sum_probabilities(candidates))
    penalty = sampling.repetition_penalty
    for v in range(len(logits)):
        candidates[v] = logits[v]
        if penalty != 1 and seen[v]:
            candidates[v] = logits[v] / penalty if logits[v] > 0 else logits[v] * penalty
    token = choose_token(candidates, heap, draw, sampling)
    seen[token] = True
    return token, logits[token] - largest - log_total


# ----------------------------------------------------------------------------------------------
# Threads


@intrinsic
def add_atomically(context, array, value):
    """Add to element 0 of an int64 array: an atomic fetch-and-add, sequentially consistent."""

    def build(target, builder, signature, arguments):
        pointer = target.make_array(signature.args[0])(target, builder, arguments[0]).data
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return numba.types.int64(array, numba.types.int64), build


@intrinsic
def read_atomically(context, array):
    """Read element 0 of an int64 array: an atomic load, sequentially consistent.

    The writes of other threads before their addition are visible afterwards.
    """

    def build(target, builder, signature, arguments):
        pointer = target.make_array(signature.args[0])(target, builder, arguments[0]).data
        return builder.load_atomic(pointer, "seq_cst", 8, typ=ir.IntType(64))

    return numba.types.int64(array), build


@exact
def wait_for_all(team):
    """Return when every thread has called this equally often: a barrier.

    It is passed thousands of times a second, so that a thread that waits spins.
    """
    if team.size > 1:
        team.expected[0] += team.size
        add_atomically(team.arrived, 1)
        while read_atomically(team.arrived) < team.expected[0]:
            pass


# ----------------------------------------------------------------------------------------------
# Decode


def decode(
    weights, cache, buffers, sampling, seen, ids, position, draws, tokens, log_probs, current, team
):
    """Read a prompt, and generate n tokens for each of B texts. All threads call this.

    Args:
        weights: the model, `Weights`.
        cache: `Cache`, of the positions before `position`; updated in place.
        buffers: `Buffers`, for at least B rows, and CHUNK if there is a prompt.
        sampling: how to choose each token, `Sampling`.
        seen: `(B, V)` bool, marks the tokens of each text; updated in place.
        ids: `(B, t)` int64, t at least 1: a prompt, or the token that was generated last.
        position: that of the first of `ids`.
        draws: `(n, B)`, uniform in [0, 1).
        tokens: `(B, n)` int64, receives the tokens.
        log_probs: `(B, n)`, receives their log-probabilities before `sampling`.
        current: `(B,)` int64, the last of `ids`; then the tokens of each step.
        team: the threads, `Team`.
    """
    B, t = ids.shape
    texts, positions = buffers.texts[team.rank], buffers.positions[team.rank]
    x, normed = buffers.x[team.rank, :B], buffers.normed[team.rank, :B]
    candidates, heap = buffers.candidates[team.rank], buffers.heap[team.rank]
    first, last = get_share(B, 1, team)  # the texts that this thread samples

    # Prefill: all tokens of the prompts but the last.
    for b in range(B):
        if position == 0 and b > 0 and is_equal(ids[b], ids[b - 1]):  # the same prompt
            h0, h1 = get_heads(cache.keys, team)
            copy_text(cache, b - 1, b, t - 1, h0, h1)
            continue
        for start in range(0, t - 1, CHUNK):
            chunk = ids[b, start : min(start + CHUNK, t - 1)]
            for m in range(len(chunk)):
                texts[m], positions[m] = b, position + start + m
            run_blocks(weights, cache, buffers, chunk, team)

    # Decode: the last token, then each token that was sampled.
    for b in range(B):
        texts[b], positions[b] = b, position + t - 1
    for i in range(len(draws)):
        run_blocks(weights, cache, buffers, current, team)
        norm, head = weights.final_norm, weights.head
        compute_logits(x, norm, head, weights.is_modern, normed, buffers.logits, team)
        wait_for_all(team)
        for b in range(first, last):
            logits, draw = buffers.logits[b], draws[i, b]
            token, log_prob = sample_token(logits, seen[b], draw, sampling, candidates, heap)
            current[b], tokens[b, i], log_probs[b, i] = token, token, log_prob
        for b in range(B):
            positions[b] += 1
        wait_for_all(team)
