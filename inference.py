"""Generate text with a trained model.

    python inference.py --prompt "ROMEO:"
    python inference.py runs/20260131_235959_baseline --temperature 0.7 --num-samples 3
    python inference.py --model-name dante --interactive
    printf "To be" | python inference.py --prompt - --json

All it needs is a bundle, wherever that was moved to.
"""

import contextlib
import functools
import io
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from bundle import (
    WEIGHTS_FILE,
    Bundle,
    create_weights_error,
    find_best_bundle,
    find_directory,
    find_run_of,
    find_usable_bundle,
    list_runs,
    load_tokenizer,
    read_bundle,
)
from engine import SamplingParams
from generate import stream_tokens
from inspect_model import find_named_model
from parameters import Count, Device, ModelName, Positive, Seed, Settings
from tokenizer import Tokenizer, normalize_for
from utils.command_line import Action, CommandLine, format_flag
from utils.errors import UserError, format_reason
from utils.files import find_text_file_problem
from utils.garbage import pause_garbage_collection
from utils.memory import check_memory, is_out_of_memory
from utils.output import Output, pluralize, run_command

if TYPE_CHECKING:
    import torch

    from engine import Engine
    from model import LanguageModel

EngineName = Literal["auto", "torch", "numba"]
# Parameters times samples up to which `auto` decodes on the CPU of a machine with a GPU, too. The
# loops on 16 cores were as fast as an H200 at 3 to 10 million (docs/LOG.md).
MAX_CPU_WORK = 10_000_000


class ModelChoice(Settings):
    """Which model to use; evaluate.py chooses one in the same way."""

    run: Annotated[str, Field(min_length=1)] | None = None
    """A run's id or directory, or a bundle anywhere. null: the newest run in runs_dir."""

    model_name: ModelName | None = None
    """A named model, instead of a run: its best step, if its run has kept that."""

    last: bool = False
    """Use the last step of a run or a named model, not the best."""

    runs_dir: str = "runs"
    """The directory of the runs."""

    checkpoints_dir: str = "checkpoints"
    """The directory of the named models."""


class InferenceConfig(ModelChoice):
    """The model to generate from, and the prompt, length and sampling."""

    prompt: str = ""
    """The text to continue; \\n is a new line, and - standard input. Empty: a new line."""

    prompt_file: Annotated[str, Field(min_length=1)] | None = None
    """A file with the text to continue, taken as it is."""

    on_unknown: Literal["error", "skip", "replace", "normalize"] = "error"
    """Characters the vocabulary lacks: error, skip, replace (by a space), normalize (Unicode)."""

    max_new_tokens: Count = 500
    """Tokens to generate for each sample."""

    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Below 1: safer; above 1: wilder; 0: always the likeliest token."""

    top_k: Positive | None = None
    """Choose among the k likeliest tokens only. null: among all."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Choose among the likeliest tokens that have this probability together. 1: among all."""

    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Choose among the tokens at least this share as likely as the likeliest. 0: among all."""

    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Above 1: what the text has already becomes less likely."""

    num_samples: Annotated[int, Field(ge=1, le=100_000)] = 1
    """How many texts to generate, side by side."""

    seed: Seed = 1337
    """The first sample's; each further one has the next seed. The same seed gives the same text."""

    device: Device = "auto"
    """auto (CUDA, else MPS, else CPU), cpu, mps, cuda or cuda:N."""

    engine: EngineName = "auto"
    """The engine that runs the model: torch; numba, several times as fast on a CPU; auto."""

    quantize: Literal["none", "int8"] = "none"
    """int8: the blocks' weights in a quarter of the memory; numba decodes large models faster."""


ACTIONS = (
    Action("stop", "End a sample before this text, \\n a new line; may be repeated.", "TEXT", True),
    Action("interactive", "Ask for one prompt after another, and continue each."),
    Action("json", "Print one JSON object: text, log_probs, tokens_per_second."),
)
OPERAND = Action("model", "A run, a bundle or a named model: as --run.", "MODEL")


# ----------------------------------------------------------------------------------------------
# The model and the prompt


@dataclass(frozen=True)
class ChosenModel:
    """A bundle, and why it was chosen among those of a run or a named model; "" if it is clear."""

    path: Path
    reason: str = ""


def find_model(config: ModelChoice, operands: Sequence[str]) -> ChosenModel:
    """Return the bundle that the settings, or a word without a flag, name.

    Raises `UserError` if there is none, or if more than one is named.
    """
    runs_dir, checkpoints_dir = Path(config.runs_dir), Path(config.checkpoints_dir)
    flags = {"--run": config.run, "--model-name": config.model_name}
    named = [*(flag for flag, name in flags.items() if name is not None), *operands]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} name more than one model: choose one")
    if not named:
        return find_newest_usable_bundle(runs_dir, last=config.last)
    if config.model_name is not None:
        directory = find_named_model(config.model_name, checkpoints_dir)
    else:
        directory = find_directory(config.run or operands[0], runs_dir, checkpoints_dir)
    return choose_bundle(directory, runs_dir, checkpoints_dir, last=config.last)


def find_newest_usable_bundle(runs_dir: Path, *, last: bool = False) -> ChosenModel:
    """Return the model of the newest run that has one. Raises `UserError` if there is none."""
    for run in list_runs(runs_dir):
        with contextlib.suppress(UserError):
            return choose_bundle(run, runs_dir, last=last)
    raise UserError(
        f"{runs_dir}: no trained model in there yet; train one with `python train.py`, "
        "or name one with --run or --model-name"
    )


def choose_bundle(
    directory: Path, runs_dir: Path, checkpoints_dir: Path | None = None, *, last: bool = False
) -> ChosenModel:
    """Return the best bundle of a run or a named model, or with `last` its last step.

    Raises `UserError` if there is none.
    """
    bundle = find_usable_bundle(directory, last=last)
    run = find_run_of(bundle)
    if run is not None:
        is_best = bundle.name == "export"
        if bundle == directory or is_best != last:
            return ChosenModel(bundle)
        if last:
            return ChosenModel(bundle, "its run has kept no checkpoint, so this is its best")
        return ChosenModel(bundle, "its run has no export yet, so this is its newest checkpoint")
    is_named = checkpoints_dir and bundle.parent.resolve() == checkpoints_dir.resolve()
    if is_named and not last and (best := find_best_bundle(bundle, runs_dir)):
        return ChosenModel(best, f"the best of {bundle}; --last uses its last step")
    return ChosenModel(bundle)


def load_model(
    reference: str | Path,
    device: "torch.device | str" = "cpu",
    *,
    checkpoints_dir: str = "checkpoints",
    runs_dir: str = "runs",
) -> tuple["LanguageModel", Tokenizer]:
    """Load a model, in eval mode, and its tokenizer.

    `reference` is a named model's name or a run's id or directory, of which the best step is
    loaded if it was kept, or a bundle.

    Raises `UserError` that names the file that is missing or does not fit, and `RunError` if the
    weights are not finite.
    """
    places = Path(runs_dir), Path(checkpoints_dir)
    chosen = choose_bundle(find_directory(str(reference), *places), *places)
    bundle = read_bundle(chosen.path, WEIGHTS_FILE)
    return load_model_from_bundle(bundle, device)


def load_model_from_bundle(
    bundle: Bundle, device: "torch.device | str" = "cpu"
) -> tuple["LanguageModel", Tokenizer]:
    """Load the model, in eval mode, and tokenizer of a bundle that was read with its weights."""
    with pause_garbage_collection():
        import torch  # late, as are these

        from checkpoint import load_weights
        from model import LanguageModel

    tokenizer = load_tokenizer(bundle)
    check_memory(bundle.config, bundle.vocab_size, torch.device(device))
    model = LanguageModel(bundle.config, bundle.vocab_size, tokenizer.num_tokens)
    load_weights(bundle, model)
    return model.to(device).eval(), tokenizer


def load_engine(
    reference: str | Path,
    engine: EngineName = "auto",
    *,
    quantize: str = "none",
    checkpoints_dir: str = "checkpoints",
    runs_dir: str = "runs",
) -> tuple["Engine", Tokenizer]:
    """Load a model to generate with as fast as this machine can, and its tokenizer.

    `reference` is that of `load_model`, which has the same errors; further, `UserError` if the
    engine is not installed. `generate_tokens` and `stream_tokens` take the engine as their model.
    """
    places = Path(runs_dir), Path(checkpoints_dir)
    chosen = choose_bundle(find_directory(str(reference), *places), *places)
    bundle = read_bundle(chosen.path, WEIGHTS_FILE)
    config = InferenceConfig(engine=engine, quantize=quantize)
    return load_engine_from_bundle(bundle, config), load_tokenizer(bundle)


def load_engine_from_bundle(
    bundle: Bundle,
    config: InferenceConfig,
    on_progress: Callable[[str], None] = lambda line: None,
) -> "Engine":
    """Load a bundle that was read with its weights into the engine that the settings ask for.

    If that is `auto`, `on_progress` is called with the reason why numba cannot be used.
    """
    if config.engine == "numba" or (config.engine == "auto" and is_better_on_cpu(bundle, config)):
        try:
            return create_numba_engine(bundle, config, on_progress)
        except EngineUnavailable as error:
            if config.engine == "numba":
                raise UserError(f"--engine numba: {error}") from error
            on_progress(f"generating with PyTorch, several times slower: {error}")
    from decode_torch import TorchEngine  # late: these bring torch
    from utils.device import choose_device
    from utils.quantization import round_to_int8

    device = choose_device(config.device)
    check_memory(bundle.config, bundle.vocab_size, device, texts=config.num_samples)
    model, _ = load_model_from_bundle(bundle, device)
    if config.quantize == "int8":
        round_to_int8(model)
    return TorchEngine(model)


class EngineUnavailable(Exception):
    """An engine cannot run here."""


def is_better_on_cpu(bundle: Bundle, config: InferenceConfig) -> bool:
    """Return whether `auto` uses the CPU: without a GPU always, with one for small work."""
    if config.device != "auto":
        return config.device == "cpu"
    parameters = len(bundle.contents[WEIGHTS_FILE]) // 4  # float32
    if parameters * config.num_samples <= MAX_CPU_WORK:
        return True
    from utils.device import choose_device  # late: it brings torch

    return choose_device("auto").type == "cpu"


def create_numba_engine(
    bundle: Bundle, config: InferenceConfig, on_progress: Callable[[str], None]
) -> "Engine":
    """Create the engine that decodes in plain loops; it does not need torch.

    Raises `EngineUnavailable` if numba is not installed, or cannot run this model here.
    """
    if config.device not in ("auto", "cpu"):
        raise EngineUnavailable(f"it decodes on a CPU, not on {config.device}")
    path = bundle.path / WEIGHTS_FILE
    import safetensors.numpy  # late, as are numba and the loops

    try:
        with pause_garbage_collection():
            from decode_numba import NumbaEngine, get_compile_cache, read_weights
    except ImportError as error:
        is_missing = getattr(error, "name", None) in ("numba", "llvmlite")
        reason = "numba is not installed" if is_missing else f"numba cannot be used ({error})"
        raise EngineUnavailable(f"{reason}: `pip install '.[fast]'`") from None
    try:
        tensors = safetensors.numpy.load(bundle.contents[WEIGHTS_FILE])
        with np.errstate(over="ignore"):  # gives infinities, which are refused below
            tensors = {name: each.astype(np.float32, copy=False) for name, each in tensors.items()}
    except KeyError as error:  # a dtype that numpy lacks
        raise EngineUnavailable(f"{path} has weights in {error.args[0]}") from None
    except safetensors.SafetensorError as error:
        raise create_weights_error(path, error) from None
    tokenizer = load_tokenizer(bundle)
    check_memory(bundle.config, bundle.vocab_size, None, texts=config.num_samples)
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise create_weights_error(path)
    int8 = config.quantize == "int8"
    cache = get_compile_cache(np.int8 if int8 else np.float32)
    if config.engine == "auto" and not (cache.is_compiled or cache.is_writable):
        raise EngineUnavailable("its compiled loops cannot be cached: no directory is writable")
    sizes = (bundle.vocab_size, tokenizer.num_tokens)
    try:
        weights = read_weights(tensors, bundle.config, *sizes, int8=int8)
    except ValueError as error:
        raise create_weights_error(path, error) from None
    try:
        return NumbaEngine(weights, bundle.config, cache, on_progress=on_progress)
    except MemoryError:
        raise
    except Exception as error:  # a compiler may raise anything
        reason = f"{type(error).__name__}: {format_reason(error)[:200]}"
        raise EngineUnavailable(f"its loops cannot be compiled: {reason}") from error


def find_conflicts(flags: Mapping[str, Any], actions: Mapping[str, Any]) -> list[str]:
    """Return one message for each pair of flags that exclude each other."""
    problems = []
    given = {name for name, value in {**flags, **actions}.items() if value is not None}
    if sys.stdin is None and ("interactive" in given or flags.get("prompt") == "-"):
        problems.append("standard input is closed")
    if "interactive" in given:
        others = map(format_flag, sorted(given & {"json", "prompt", "prompt_file"}))
        problems += [f"--interactive asks for prompts: leave {flag} out" for flag in others]
    if {"prompt", "prompt_file"} <= given:
        problems.append("--prompt and --prompt-file both give a prompt: choose one")
    if "" in actions.get("stop", []):
        problems.append("--stop must not be empty")
    return problems


def read_prompt(config: InferenceConfig) -> str:
    """Return the prompt. Raises `UserError` if its file or standard input is not text."""
    if config.prompt_file is not None:
        if problem := find_text_file_problem(Path(config.prompt_file)):
            raise UserError(f"{config.prompt_file}: {problem}")
        return decode_text(Path(config.prompt_file).read_bytes(), config.prompt_file)
    if config.prompt == "-":
        content = sys.stdin.buffer.read()
        return decode_text(content, "standard input") if content else ""
    return unescape(config.prompt)


def decode_text(raw: bytes, name: str) -> str:
    """Decode UTF-8 without its byte order mark. Raises `UserError` if it is invalid or empty."""
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}: not UTF-8 text (byte {raw[error.start]:#04x} in line {line}): "
            "convert it to UTF-8 first, for example with iconv"
        ) from None
    if not text:
        raise UserError(f"{name}: the file is empty")
    return text


def unescape(text: str) -> str:
    r"""Replace `\n` by a new line, `\t` by a tab, `\\` by a backslash."""
    meanings = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda match: meanings[match[1]], text)


# ----------------------------------------------------------------------------------------------
# Generation


class Sample:
    """The continuation of a prompt, up to the first stop sequence.

    Text that may be the beginning of a stop sequence is held back until that is decided.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self.is_finished = False
        self._decode = tokenizer.create_stream_decoder()
        self._stop = re.compile("|".join(map(re.escape, stops)) or "(?!)")  # (?!) is never found
        beginnings = (re.escape(stop[:n]) for stop in stops for n in range(1, len(stop)))
        self._undecided = re.compile(f"({'|'.join(beginnings)})?\\Z")
        self._text, self._held = io.StringIO(), ""
        self._log_probs: list[tuple[int, float]] = []  # with the position of the token's text

    @property
    def text(self) -> str:
        """The text so far."""
        return self._text.getvalue()

    @property
    def log_probs(self) -> list[float]:
        """The log-probability of each token that contributes to `text`."""
        return [log_prob for start, log_prob in self._log_probs if start < self._text.tell()]

    def add(self, tokens: Sequence[int], log_probs: Sequence[float]) -> str:
        """Append tokens, and return the new text; drop all that follows a stop sequence."""
        new = ""
        for token, log_prob in zip(tokens, log_probs, strict=True):
            if self.is_finished:
                break
            self._log_probs.append((self._text.tell() + len(self._held), log_prob))
            self._held += self._decode([token])
            stop = self._stop.search(self._held)
            new += self._release((stop or self._undecided.search(self._held)).start())
            self.is_finished = stop is not None
        return new

    def finish(self) -> str:
        """Release the text held back, as no further token can complete a stop sequence."""
        return "" if self.is_finished else self._release(len(self._held))

    def _release(self, length: int) -> str:
        """Move `length` characters from the text held back to `text`."""
        piece, self._held = self._held[:length], self._held[length:]
        self._text.write(piece)
        return piece


@dataclass
class TextGenerator:
    """Continues prompts by one model and one way of sampling, up to a stop sequence."""

    stream: Callable[..., Iterator[tuple[np.ndarray, np.ndarray]]]  # `stream_tokens`
    tokenizer: Tokenizer
    block_size: int  # the model's context T
    config: InferenceConfig
    stops: Sequence[str]
    output: Output
    seed: int  # of the first sample

    def print_samples(self, prompt: str) -> None:
        """Print the first sample token by token, then the others."""
        prompt, ids, samples = self._prepare(prompt)
        self._print_sample(prompt, (text for _, text in self._generate(ids, samples)))
        for sample in samples[1:]:
            self.output.print("---")
            self._print_sample(prompt, [sample.text])

    def _print_sample(self, prompt: str, pieces: Iterable[str]) -> None:
        """Print the prompt, in bold on a terminal, and its continuation piece by piece."""
        style = "bold" if prompt.strip("\n") else ""
        try:
            for piece in strip_new_lines(itertools.chain([prompt], pieces)):
                self.output.print_piece(piece, style)
                style = ""
                if self.output.quiet:  # standard output was closed
                    return
        finally:
            self.output.print()

    def generate_json(self, prompt: str) -> dict[str, Any]:
        """Generate the samples; return the first one's fields, and a list if there are several."""
        prompt, ids, samples = self._prepare(prompt)
        arrivals = [(time.perf_counter(), number) for number, _ in self._generate(ids, samples)]
        results = [
            {"text": prompt + sample.text, "log_probs": sample.log_probs, "seed": self.seed + k}
            for k, sample in enumerate(samples)
        ]
        # The first tokens include the prefill: count those after them.
        decoded = sum(number for _, number in arrivals[1:])
        seconds = arrivals[-1][0] - arrivals[0][0] if decoded else 0.0
        speed = {"tokens_per_second": decoded / seconds if decoded else None}
        several = {"samples": results} if len(results) > 1 else {}
        return {"prompt": prompt, **results[0], **speed, **several}

    def _prepare(self, prompt: str) -> tuple[str, np.ndarray, list[Sample]]:
        """Return the prompt without unknown characters, its ids, and samples; note all changes."""
        tokenizer, note = self.tokenizer, self.output.print_note
        if self.config.on_unknown == "normalize":
            prompt, form = normalize_for(tokenizer, prompt)
            if form:
                note(f"normalized the prompt to {form}")
        elif self.config.on_unknown != "error":
            is_replaced = self.config.on_unknown == "replace"
            prompt, number = remove_unknown(tokenizer, prompt, is_replaced)
            if number:
                done = "replaced" if is_replaced else "skipped"
                characters = pluralize(number, "character")
                note(f"{done} {characters} of the prompt that are not in the vocabulary")
        if not prompt:
            prompt = tokenizer.default_prompt
            start = "a new line" if prompt == "\n" else repr(prompt)
            note(f"no prompt: starting with {start}")
        ids = tokenizer.encode(prompt)
        if len(ids) > self.block_size:
            length = pluralize(len(ids), tokenizer.unit)
            note(f"the prompt has {length}: the model sees the last {self.block_size}")
        return prompt, ids, [Sample(tokenizer, self.stops) for _ in range(self.config.num_samples)]

    def _generate(self, ids: np.ndarray, samples: Sequence[Sample]) -> Iterator[tuple[int, str]]:
        """Extend the samples until all are finished.

        Yields the number of tokens of each call, and the first sample's new text.
        """
        seeds = [self.seed + k for k in range(len(samples))]
        with contextlib.closing(self.stream(ids, seeds=seeds)) as stream:
            for tokens, log_probs in stream:
                rows = zip(samples, tokens.tolist(), log_probs.tolist(), strict=True)
                new = [sample.add(*row) for sample, *row in rows]
                yield tokens.size, new[0]
                if all(sample.is_finished for sample in samples):
                    break
        rest = [sample.finish() for sample in samples]
        if rest[0]:
            yield 0, rest[0]


def remove_unknown(tokenizer: Tokenizer, text: str, replace: bool) -> tuple[str, int]:
    """Return `text` without the characters that the tokenizer lacks, and how many there were.

    If `replace` is set, each is replaced by a space, or by the default prompt if that is unknown.
    """
    unknown = tokenizer.count_unknown(text)
    space = "" if tokenizer.count_unknown(" ") else " "
    replacement = (space or tokenizer.default_prompt) if replace else ""
    return text.translate({ord(char): replacement for char in unknown}), sum(unknown.values())


def strip_new_lines(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the pieces of a text without its leading and trailing new lines."""
    has_begun, held = False, ""  # new lines are held back until text follows
    for piece in pieces:
        text = held + piece if has_begun else piece.lstrip("\n")
        shown = text.rstrip("\n")
        held = text[len(shown) :]
        if shown:
            has_begun = True
            yield shown


def prompt_repeatedly(generator: TextGenerator) -> None:
    """Ask for one prompt after another and continue each, with new seeds each time.

    Ctrl-C ends a sample or discards a line; Ctrl-D ends the loop.
    """
    output, is_terminal = generator.output, sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are not text: unknown characters
        sys.stdin.reconfigure(errors="surrogateescape")
    if is_terminal:
        with contextlib.suppress(ImportError):  # not on Windows, whose console edits lines itself
            import readline  # noqa: F401  # gives input() arrow keys and a history
        output.print_note("type a text to continue; Ctrl-C ends a sample, Ctrl-D ends the program")
    while True:
        try:
            generator.print_samples(unescape(input("> " if is_terminal else "")))
        except EOFError:
            if is_terminal:
                output.print()
            return
        except UserError as error:
            for problem in error.problems:
                output.print_error(problem)
        except KeyboardInterrupt:
            output.print_note("\nstopped")
        generator.seed += generator.config.num_samples


def main(argv: Sequence[str]) -> int:
    """Generate text: resolve the settings, load the model, then print samples."""
    command_line = CommandLine(__doc__, InferenceConfig, ACTIONS, operands=OPERAND)
    flags, actions, problems = command_line.parse(argv)
    if problems := problems + find_conflicts(flags, actions):
        raise UserError(*problems)
    config = InferenceConfig(**flags)
    chosen = find_model(config, actions["model"])
    is_interactive = "interactive" in actions
    prompt = "" if is_interactive else read_prompt(config)
    stops = [unescape(text) for text in actions.get("stop", [])]
    output = Output()

    bundle = read_bundle(chosen.path, WEIGHTS_FILE)
    tokenizer = load_tokenizer(bundle)
    reason = f": {chosen.reason}" if chosen.reason else ""
    output.print_note(f"{chosen.path}, step {bundle.state.step:,}{reason}")
    names = {field.name for field in fields(SamplingParams)}
    sampling = SamplingParams(**config.model_dump(include=names))
    try:
        engine = load_engine_from_bundle(bundle, config, output.print_note)
        settings = {"max_new_tokens": config.max_new_tokens, "sampling": sampling}
        stream = functools.partial(stream_tokens, engine, **settings)
        generator = TextGenerator(
            stream, tokenizer, engine.block_size, config, stops, output, config.seed
        )
        if "json" in actions:
            facts = {"model": str(chosen.path), "step": bundle.state.step, **asdict(sampling)}
            facts |= {"quantize": config.quantize, "engine": engine.name}
            output.print(json.dumps({**facts, **generator.generate_json(prompt)}))
        elif is_interactive:
            prompt_repeatedly(generator)
        else:
            generator.print_samples(prompt)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        samples = pluralize(config.num_samples, "sample")
        raise UserError(f"{samples} at once do not fit into memory: generate fewer") from error
    return output.exit_status


if __name__ == "__main__":
    sys.exit(run_command(main))
