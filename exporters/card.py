"""The model card of an export: `README.md`, and the loss curve that it shows.

It is made from the bundle and the record of its run. Paths are cut to their last part, as others
may have the name of a user.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import ValidationError

from corpus import LARGE_BYTES
from data import load_dataset
from decode_torch import TorchEngine
from engine import SamplingParams
from exporters.source import ExportSource
from generate import generate_tokens
from parameters import GROUPS, ModelConfig
from utils.checks import format_value
from utils.data_files import SAMPLE_CORPUS, has_bytes
from utils.errors import RunError, UserError, escape_unprintable
from utils.files import find_text_file_problem, write_durable
from utils.output import escape_control, format_duration, pluralize
from utils.overlap import find_longest_overlap
from utils.report import compute_losses, render
from utils.report.runs import TRAIN, VAL, VAL_BITS, LoggedRun

TEMPLATES = Path(__file__).resolve().parent / "templates"
TARGETS = {
    "hf": "Transformers",
    "onnx": "ONNX Runtime",
    "gguf": "llama.cpp",
    "html": "a web browser",
}
SAMPLE_TOKENS, SAMPLE_SEED, SAMPLE_TEMPERATURE = 300, 1337, 0.8
MIN_OVERLAP = 4  # tokens
SOFTWARE = {"python": "Python", "torch": "PyTorch"}  # in env.txt
BEYOND = "; a longer text cannot be continued"
# Treatment of characters in a prompt that the vocabulary lacks.
UNKNOWN = {
    "hf": "are left out",
    "onnx": "are left out",
    "gguf": "are an error",
    "html": "are left out",
}
MAX_CELL = 300  # characters of a value in a table
# Settings that are in the table of facts already, or that no model depends on.
SHOWN = {*GROUPS["architecture"].model_fields, "data", "seed", "init_from", "batch_size"}
IRRELEVANT = {*GROUPS["tracking"].model_fields, *GROUPS["saving"].model_fields, "token_store"}


@dataclass(frozen=True)
class Card:
    """The facts that the card of a model states, as plain text.

    `tokens` is the training split, `(N,)`; if it is None, `reason` says why.
    """

    name: str
    source: ExportSource
    run: LoggedRun | None
    data: dict[str, Any]
    facts: list[tuple[str, str]]
    settings: list[tuple[str, str]]
    sample: str
    overlap: str
    tokens: np.ndarray | None
    reason: str


def create_card(source: ExportSource, run: LoggedRun | None, name: str) -> Card:
    """Collect the facts about a model, generate a sample, and compare it with the training text."""
    try:
        tokens, reason = read_training_tokens(source), ""
    except UserError as error:
        tokens, reason = None, str(error)
    data, sample = describe_data(source, run), generate_sample(source)
    return Card(
        name=name,
        source=source,
        run=run,
        data=data,
        facts=list(list_facts(source, run, data)),
        settings=list(list_changed_settings(source)),
        sample=sample,
        overlap=describe_overlap(source, sample, run, tokens, reason),
        tokens=tokens,
        reason=reason,
    )


def write_card(directory: Path, card: Card, *, format: str, files: Mapping[str, str]) -> None:
    """Write `README.md`, and `loss.svg` if the run's metrics are there.

    `files` has the SHA-256 of each exported file.
    """
    source, run = card.source, card.run
    tokenizer = source.tokenizer
    has_curve = run is not None and bool(run.metrics)
    if has_curve:
        values = compute_losses(run, width=720, height=380)
        write_durable(directory / "loss.svg", render("curve.svg.jinja", **values))
    parameters = source.model.count_parameters()
    values = {
        "source": source,
        "format": format,
        "target": TARGETS[format],
        "title": card.name,
        "file": next((each for each in files if each.endswith((".gguf", ".html"))), None),
        "files": sorted(files.items()),
        "parameters": parameters,
        "data": card.data,
        "prompt": tokenizer.default_prompt,
        "shell_prompt": shlex.quote(escape_unprintable(tokenizer.default_prompt)),
        "length": max(1, min(200, source.config.block_size - 1)),
        "sample": escape_control(card.sample).strip("\n"),
        "temperature": SAMPLE_TEMPERATURE,
        "seed": SAMPLE_SEED,
        "fence": create_fence(card.sample),
        "overlap": escape_markup(card.overlap),
        "curve": has_curve,
        "facts": card.facts,
        "settings": card.settings,
        "unit": tokenizer.unit,
        "unknown": UNKNOWN[format] if tokenizer.token_kind == "char" else "",
        "beyond": "" if format == "hf" and source.config.architecture == "modern" else BEYOND,
    }
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": format_cell, "number": "{:,}".format}
    text = environment.get_template("card.md.jinja").render(values)
    write_durable(directory / "README.md", text.encode("utf-8", "backslashreplace"))


def describe_data(source: ExportSource, run: LoggedRun | None) -> dict[str, Any]:
    """Return the name, the SHA-256 and the size of the training text, as far as it is known."""
    state = source.bundle.state
    if state.is_imported:
        return {"name": "an unknown text", "sha256": None, "size": "size unknown"}
    recorded = run.facts.data if run else None
    path = recorded.name if recorded else state.settings.get("data") or SAMPLE_CORPUS
    size = recorded.tokens if recorded else None
    return {
        "name": escape_unprintable(get_last_part(str(path))),
        "sha256": state.get_fact("data_sha256"),
        "size": f"{size:,} {source.tokenizer.unit}s" if size else "size unknown",
    }


def get_last_part(path: str) -> str:
    """Return the last part of a path of any system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "text"


def list_facts(
    source: ExportSource, run: LoggedRun | None, data: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yield the facts of the model and its training, by name."""
    config, state, unit = source.config, source.bundle.state, source.tokenizer.unit
    yield "Text", f"{data['name']}, {data['size']}"
    if data["sha256"]:
        yield "SHA-256 of the text", data["sha256"]
    vocabulary = pluralize(source.tokenizer.num_tokens, "token")
    yield "Tokenizer", f"{source.tokenizer.token_kind}, {vocabulary}"
    yield (
        "Shape",
        f"{config.architecture}: {pluralize(config.n_layer, 'layer')}, "
        f"{pluralize(config.n_head, 'head')}, {config.n_embd} channels, context "
        f"{config.block_size}, {config.activation}, "
        f"{'tied' if config.tie_weights else 'untied'} head"
        f"{f', {config.ngram_rows:,} rows of n-grams' if config.ngram_rows else ''}"
        f"{', biases' if config.bias else ''}",
    )
    at_step = [line for line in (run.metrics if run else ()) if line["step"] == state.step]
    evaluation = next((line for line in at_step if VAL in line), {})
    if state.val_loss is not None:
        bits = f" ({evaluation[VAL_BITS]:.3f} bits per byte)" if VAL_BITS in evaluation else ""
        yield "Validation loss", f"{state.val_loss:.4f} nats per {unit}{bits}"
    if TRAIN in evaluation:
        yield "Training loss", f"{evaluation[TRAIN]:.4f} nats per {unit}"
    if not state.is_imported:
        batch = f"batch {config.batch_size} x {config.block_size} {unit}s"
        steps = format_value(state.settings.get("max_iters"))
        yield "Steps", f"{state.step:,} of {steps}, {batch}"
        yield "Seed", format_value(state.settings.get("seed"))
        yield "Run", str(state.run_id)
    if run is not None:
        yield from list_run_facts(run)
    for number, ancestor in enumerate(state.lineage):
        verb = "Imported" if state.is_imported else "Fine-tuned from"
        yield (
            verb if number == 0 else "and that from",
            f"{get_last_part(ancestor.name)} at step {ancestor.step:,}, weights "
            f"{ancestor.weights_sha256}, text {ancestor.data_sha256 or 'unknown'}",
        )


def list_run_facts(run: LoggedRun) -> Iterator[tuple[str, str]]:
    """Yield the duration, the machine and the code of a run."""
    if run.seconds is not None:
        yield "Duration", format_duration(run.seconds)
    lines = [line.split(": ", 1) for line in run.environment.partition("\n\n")[0].splitlines()]
    machine = {parts[0]: parts[1] for parts in lines if len(parts) == 2}
    hardware = [machine[key] for key in ("device", "processor") if key in machine]
    if hardware:
        processes = f", {run.facts.processes} processes" if run.facts.processes > 1 else ""
        yield "Hardware", ", ".join(hardware) + processes
    yield "Precision", f"{run.facts.precision}, torch.compile {run.facts.torch_compile}"
    software = [
        f"{name} {machine[key]}".strip() for key, name in SOFTWARE.items() if key in machine
    ]
    if software:
        yield "Software", ", ".join(software)
    git = run.record["git"]
    if "commit" in git:
        changes = "" if str(git.get("dirty")).startswith("no") else " with uncommitted changes"
        yield "Commit of Folio", f"{git['commit']}{changes}"
    if run.facts.started:
        yield "Started", run.facts.started[:10]


def list_changed_settings(source: ExportSource) -> Iterator[tuple[str, str]]:
    """Yield the settings of training that are not the defaults."""
    for name, value in source.bundle.state.settings.items():
        if name not in SHOWN | IRRELEVANT and value != ModelConfig.model_fields[name].default:
            yield name, format_value(value)


# ----------------------------------------------------------------------------------------------
# Sample


def generate_sample(source: ExportSource) -> str:
    """Return the prompt that the tokenizer starts with, and its continuation."""
    tokenizer = source.tokenizer
    prompt = tokenizer.encode(tokenizer.default_prompt)
    sampling = SamplingParams(temperature=SAMPLE_TEMPERATURE)
    engine = TorchEngine(source.model)
    ids = generate_tokens(engine, prompt, SAMPLE_TOKENS, sampling, seeds=[SAMPLE_SEED])
    return tokenizer.decode(ids[0])


def describe_overlap(
    source: ExportSource, sample: str, run: LoggedRun | None, tokens: np.ndarray | None, reason: str
) -> str:
    """Describe the longest stretch of the sample that stands in the training text, `tokens`.

    Without that text, that of the sample at the end of the run.
    """
    if tokens is not None:
        ids = np.asarray(source.tokenizer.encode(sample))
        found = source.tokenizer.decode(ids[find_longest_overlap(ids, tokens, MIN_OVERLAP)])
        subject = "Its longest stretch that stands verbatim in the training text"
    elif run is None or not run.result.longest_overlap:
        return f"It was not compared with the training text: {truncate(reason)}."
    else:
        found = run.result.longest_overlap
        subject = (
            "In another sample, at the end of training, the longest stretch that stands verbatim "
            "in the training text"
        )
    quoted = truncate(json.dumps(found, ensure_ascii=False))
    return f"{subject} has {pluralize(len(found), 'character')}: {quoted}."


def read_training_tokens(source: ExportSource) -> np.ndarray:
    """Return the training split, `(N,)`.

    Raises `UserError` if the text is not known, not there, changed or large. A bundle is data from
    a stranger: it may name one file, and nothing is written to the cache.
    """
    state = source.bundle.state
    path, digest = state.settings.get("data"), state.get_fact("data_sha256")
    if digest is None:
        raise UserError("it is not known")
    if path is not None:
        if problem := find_text_file_problem(Path(path)):
            raise UserError(problem)
        try:
            is_large = has_bytes([Path(path)], LARGE_BYTES)
        except (UserError, OSError):  # whose messages have the path
            raise UserError("it cannot be read") from None
        if is_large:
            raise UserError("it is large")
    settings = {**source.config.model_dump(), **state.settings, "token_store": "off"}
    try:
        config = ModelConfig(**{**settings, "tokenizer": source.tokenizer.token_kind})
    except ValidationError:  # settings that do not fit together
        raise UserError("its settings are not valid") from None
    try:
        data = load_dataset(config, tokenizer=source.tokenizer, use_sample_corpus=path is None)
    except (UserError, RunError, OSError):  # as above
        raise UserError("it cannot be read") from None
    if data.sha256 != digest:
        raise UserError("it has changed since")
    return data.splits["train"]


def create_fence(text: str) -> str:
    """Return a fence of a Markdown code block that `text` cannot close."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))


def format_cell(value: str) -> str:
    """Return a value for Markdown text or a table, on one line, without markup."""
    return escape_markup(truncate(value))


def truncate(value: str) -> str:
    """Return a value on one line, cut to `MAX_CELL` characters."""
    text = escape_unprintable(value)
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"


def escape_markup(text: str) -> str:
    """Escape the characters that Markdown or HTML would take for markup."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)
