"""Comparison of an export, loaded by the program that it is for, with its source."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from decode_torch import TorchEngine
from engine import SamplingParams
from exporters.source import ExportSource
from generate import generate_tokens
from utils.output import pluralize

PROMPTS = 20
PROMPT_TOKENS = 64  # or as many as the context has, if these are fewer
GREEDY_TOKENS = 200


class TargetModel(Protocol):
    """A model, loaded by another program. Ids are those of the exported tokenizer."""

    library: str
    """The program and its version."""

    def compute_logits(self, ids: np.ndarray) -> np.ndarray:
        """Return the logits `(T, V)` of a text, `(T,)`."""

    def generate(self, ids: np.ndarray, n: int) -> np.ndarray:
        """Return the n most likely tokens that follow `ids`, one after another, `(n,)`."""

    def encode(self, text: str) -> Sequence[int]:
        """Return the ids of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a sequence of ids."""


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_with_source`.

    `difference` is the largest absolute one of the logits over all prompts. `agreeing` of
    `generated` tokens of greedy text are the same, from the first one on.
    """

    library: str
    difference: float
    agreeing: int
    generated: int
    is_text_same: bool

    def format(self) -> str:
        """Return the comparison as one line."""
        text = "identical" if self.is_text_same else "DIFFERENT"
        greedy = f"{self.agreeing} of {pluralize(self.generated, 'greedy token')} identical"
        return (
            f"{self.library}: logits differ by at most {self.difference:.1e} over {PROMPTS} "
            f"prompts, {greedy}, text to ids and back {text}"
        )


@torch.no_grad()
def compare_with_source(source: ExportSource, target: TargetModel) -> Comparison:
    """Compare logits, greedy text and tokenizer."""
    tokenizer, T = source.tokenizer, source.config.block_size
    engine, tokens = TorchEngine(source.model), tokenizer.num_tokens
    start = tokenizer.encode(tokenizer.default_prompt)[-T:]
    prompts = generate_tokens(engine, start, min(PROMPT_TOKENS, T), seeds=range(PROMPTS))[:, -T:]
    difference = 0.0
    for ids in prompts:
        logits = source.model(ids)[0][0, :, :tokens].numpy()
        theirs = target.compute_logits(ids)[:, :tokens]
        difference = max(difference, float(np.abs(logits - theirs).max()))
    n = min(GREEDY_TOKENS, T - len(start))
    ours = generate_tokens(engine, start, n, SamplingParams(temperature=0))[0, len(start) :]
    same = ours == target.generate(np.asarray(start, dtype=np.int64), n)
    text = tokenizer.decode(prompts.ravel())
    if tokenizer.token_kind == "char":
        text += "".join(tokenizer.chars)
    ids = tokenizer.encode(text).tolist()
    theirs = list(target.encode(text))
    return Comparison(
        library=target.library,
        difference=difference,
        agreeing=n if same.all() else int(np.argmin(same)),
        generated=n,
        is_text_same=theirs == ids and target.decode(theirs) == text,
    )
