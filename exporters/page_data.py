"""The data of an HTML page: its models, their checkpoints and cards, and the text of model.py."""

import ast
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import model as model_module
from bundle import Bundle, list_checkpoints, read_bundle
from exporters.bpe import list_bpe
from exporters.card import Card
from exporters.ngrams import LENGTH, create_memorization
from exporters.source import ExportSource, load_source
from model import LanguageModel
from tokenizer import CharTokenizer, Tokenizer
from utils.errors import UserError
from utils.report.runs import TRAIN, VAL, LoggedRun

MAX_POINTS = 200  # of a loss curve
ARCHITECTURE = {
    *("architecture", "block_size", "n_embd", "n_head", "n_layer", "activation", "bias"),
    *("tie_weights", "rope_theta", "ngram_rows"),
}
LEFT_OUT = "left out by --no-memorization"


# ----------------------------------------------------------------------------------------------
# Checkpoints


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a run. `bundle` is None if its weights are the initialization, rebuilt.

    Losses are in nats per token, None if the step was not evaluated.
    """

    step: int
    kind: str  # initial, checkpoint, best or last
    bundle: Bundle | None
    train_loss: float | None
    val_loss: float | None


def select_checkpoints(source: ExportSource, run: LoggedRun | None, count: int) -> list[Checkpoint]:
    """Return at most `count` checkpoints of a model's run, in the order of their steps.

    First the exported one, then the last, the first, which may be the initialization, and then
    those that are nearest to equal distances.
    """
    bundles: dict[int, Bundle | None] = {**find_bundles(source, run)}
    shown, last = source.bundle.state.step, max(bundles)
    best = bundles[last].state.get_fact("best_step")
    if is_from_scratch(source):
        bundles.setdefault(0, None)
    steps = np.array(sorted(bundles))
    chosen = list(dict.fromkeys([shown, last, int(steps[0])]))[:count]
    missing = min(count, len(steps)) - len(chosen)
    for target in np.linspace(steps[0], last, missing + 2)[1:-1]:
        rest = np.setdiff1d(steps, chosen)
        chosen.append(int(rest[np.abs(rest - target).argmin()]))
    evaluations = {line["step"]: line for line in (run.metrics if run else ()) if VAL in line}

    def describe(step: int) -> Checkpoint:
        bundle, line = bundles[step], evaluations.get(step, {})
        is_last = step == last and (run is None or step == run.last_step)
        kinds = {"initial": bundle is None, "best": step == best, "last": is_last}
        kind = next((name for name, holds in kinds.items() if holds), "checkpoint")
        recorded = bundle.state.val_loss if bundle else None
        return Checkpoint(step, kind, bundle, line.get(TRAIN), line.get(VAL, recorded))

    return [describe(step) for step in sorted(chosen)]


def find_bundles(source: ExportSource, run: LoggedRun | None) -> dict[int, Bundle]:
    """Return the bundles of a model's run that have its shape and its tokenizer, by step."""
    ours, found = source.bundle, {}
    for path in [*list_checkpoints(run.path), run.path / "artifacts" / "export"] if run else ():
        with contextlib.suppress(UserError):  # damaged, or just removed by its own run
            bundle = read_bundle(path)
            shapes = [each.config.model_dump(include=ARCHITECTURE) for each in (ours, bundle)]
            if shapes[0] == shapes[1] and bundle.tokenizer == ours.tokenizer:
                found[bundle.state.step] = bundle
    return {**found, ours.state.step: ours}


def is_from_scratch(source: ExportSource) -> bool:
    """Return whether a run trained the model from scratch: its seed gives its initialization."""
    state = source.bundle.state
    return state.get_fact("start_step") == 0 and not state.lineage and "seed" in state.settings


def load_checkpoint(source: ExportSource, checkpoint: Checkpoint) -> ExportSource:
    """Load a checkpoint of a model, or rebuild its initialization as trainer.py makes it."""
    if checkpoint.bundle is source.bundle:
        return source
    if checkpoint.bundle is not None:
        return load_source(checkpoint.bundle.path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.bundle.state.settings["seed"])
        vocab_size, tokens = source.bundle.vocab_size, source.tokenizer.num_tokens
        return replace(source, model=LanguageModel(source.config, vocab_size, tokens).eval())


# ----------------------------------------------------------------------------------------------
# Description


def describe_model(
    card: Card, dtype: str, checkpoints: Sequence[dict[str, Any]], *, memorization: bool
) -> dict[str, Any]:
    """Return the data of a model. No value has a path or a user's name: see card.py.

    `memorization`: whether to hash the training text.
    """
    source, run, tokenizer = card.source, card.run, card.source.tokenizer
    state = source.bundle.state
    hashes, reason = find_memorization(card) if memorization else (None, LEFT_OUT)
    steps = [each["step"] for each in checkpoints]
    return {
        "name": card.name,
        "run_id": state.run_id,
        "config": {
            **source.config.model_dump(include=ARCHITECTURE),
            "hidden": get_hidden_width(source),
        },
        "num_tokens": tokenizer.num_tokens,
        "tokenizer": describe_tokenizer(tokenizer),
        "default_prompt": tokenizer.default_prompt,
        "dtype": dtype,
        "checkpoints": checkpoints,
        "shown": steps.index(state.step),
        "curve": {"train": list_points(run, TRAIN), "val": list_points(run, VAL)} if run else None,
        "overfitting": run.result.overfitting.model_dump()
        if run and run.result.overfitting
        else None,
        "card": {
            "facts": card.facts,
            "settings": card.settings,
            "sample": card.sample,
            "overlap": card.overlap,
        },
        "memorization": hashes,
        "memorization_reason": reason,
    }


def get_hidden_width(source: ExportSource) -> int:
    """Return the width of the MLP, F."""
    return source.model.blocks[0].mlp.projection.in_features


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a vocabulary: characters, or byte-level tokens and pairs of ids to merge."""
    facts = {"kind": tokenizer.token_kind, "unit": tokenizer.unit}
    if isinstance(tokenizer, CharTokenizer):
        return {**facts, "chars": tokenizer.chars}
    tokens, merges = list_bpe(tokenizer)
    ids = {token: number for number, token in enumerate(tokens)}
    return {**facts, "tokens": tokens, "merges": [[ids[a], ids[b]] for a, b in merges]}


def find_memorization(card: Card) -> tuple[dict[str, Any] | None, str]:
    """Return the hashes of a model's training text, or None and the reason why there are none."""
    if card.tokens is None:
        return None, f"the training text was not read: {card.reason}"
    text = card.source.tokenizer.decode(card.tokens)
    if len(text) < LENGTH:
        return None, f"the training text is shorter than {LENGTH} characters"
    return create_memorization(text), ""


def list_points(run: LoggedRun, tag: str) -> list[tuple[float, float]]:
    """Return a metric by step, evenly thinned to at most `MAX_POINTS`, the ends included."""
    points = run.get_points(tag)
    count = min(len(points), MAX_POINTS)
    return [points[i] for i in np.linspace(0, len(points) - 1, count).round().astype(int)]


def list_definitions() -> dict[str, dict[str, Any]]:
    """Return the lines of each class, method and function of model.py, by its qualified name."""
    text = Path(model_module.__file__).read_text(encoding="utf-8")
    lines, found = text.splitlines(), {}

    def collect(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                start, end = child.lineno, child.end_lineno
                source = "\n".join(lines[start - 1 : end])
                found[prefix + child.name] = {"start": start, "end": end, "text": source}
                if isinstance(child, ast.ClassDef):
                    collect(child, f"{child.name}.")

    collect(ast.parse(text), "")
    return found
