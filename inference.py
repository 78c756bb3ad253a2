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
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from bundle import (
    WEIGHTS_FILE,
    find_directory,
    find_named_model,
    find_newest_usable_bundle,
    find_run_of,
    find_usable_bundle,
    list_checkpoints,
    read_bundle,
)
from parameters import Count, Device, ModelName, Positive, Seed, Settings, Switch
from tokenizer import Tokenizer, remove_unknown
from utils.command_line import Action, CommandLine
from utils.errors import UserError
from utils.files import decode_text, find_text_file_problem
from utils.output import Output, pluralize, run_command

if TYPE_CHECKING:
    from torch import Tensor

STANDARD_INPUT = "-"
SAMPLING_SETTINGS = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")


class ModelChoice(Settings):
    """Which model to use; evaluate.py chooses one in the same way."""

    run: Annotated[str, Field(min_length=1)] | None = None
    """A run's id or directory, or a bundle anywhere. null: the newest run in runs_dir."""

    model_name: ModelName | None = None
    """A named model, instead of a run."""

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

    on_unknown: Literal["error", "skip", "replace"] = "error"
    """For characters missing from the vocabulary: error, skip, or replace (by a space if known)."""

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

    torch_compile: Switch = "auto"
    """Compile for speed: two minutes that pay back after some 200,000 tokens."""

    quantize: Literal["none", "int8"] = "none"
    """int8: on a CPU, the blocks' weights in a quarter of the memory; faster for large models."""


ACTIONS = (
    Action(
        "stop", "End a sample before this text; \\n is a new line; may be repeated.", "TEXT", True
    ),
    Action("interactive", "Ask for one prompt after another, and continue each."),
    Action("json", "Print one JSON object: text, log_probs, tokens_per_second."),
)
OPERAND = Action("model", "A run, a bundle or a named model: as --run.", "MODEL")


# ----------------------------------------------------------------------------------------------
# The model and the prompt


def find_model(config: ModelChoice, operands: Sequence[str] | None = None) -> Path:
    """Return the bundle that the settings, or a word without a flag, name.

    Raises `UserError` if there is none, or if more than one is named.
    """
    runs_dir, checkpoints_dir = Path(config.runs_dir), Path(config.checkpoints_dir)
    flags = {"--run": config.run, "--model-name": config.model_name}
    named = [flag for flag, name in flags.items() if name is not None] + list(operands or ())
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} name more than one model: choose one")
    if config.model_name is not None:
        return find_usable_bundle(find_named_model(config.model_name, checkpoints_dir))
    reference = operands[0] if operands else config.run
    if reference is not None:
        return find_usable_bundle(find_directory(reference, runs_dir, checkpoints_dir))
    return find_newest_usable_bundle(runs_dir)


def format_source(directory: Path, step: int) -> str:
    """Describe the bundle, and whether it is a checkpoint in the place of an export."""
    run = find_run_of(directory)
    note = f"{directory}, step {step}"
    if run is None or (run / "artifacts" / "export").exists():
        return note
    if directory != list_checkpoints(run)[-1]:  # an older one, named by the user
        return note
    return f"{note}: its run has no export yet, so this is its newest checkpoint"


def find_conflicts(flags: Mapping[str, Any], actions: Mapping[str, Any]) -> list[str]:
    """Return one message for each pair of flags that exclude each other."""
    problems = []
    if sys.stdin is None and ("interactive" in actions or flags.get("prompt") == STANDARD_INPUT):
        problems.append("standard input is closed")
    has_file = flags.get("prompt_file") is not None
    if "interactive" in actions:
        others = {"json": "json" in actions, "prompt": "prompt" in flags, "prompt-file": has_file}
        names = [f"--{name}" for name, is_given in others.items() if is_given]
        problems += [f"--interactive asks for prompts: leave {name} out" for name in names]
    if "prompt" in flags and has_file:
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
    if config.prompt == STANDARD_INPUT:
        content = sys.stdin.buffer.read()
        return decode_text(content, "standard input") if content else ""
    return unescape(config.prompt)


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
        self._stops, self._held = stops, ""
        self._pieces: list[str] = []
        self._length = self._num_taken = 0  # characters, and pieces taken by `take_new_text`
        self._log_probs: list[tuple[int, float]] = []  # with the position of the token's text

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._pieces)

    @property
    def log_probs(self) -> list[float]:
        """The log-probability of each token that contributes to `text`."""
        return [log_prob for start, log_prob in self._log_probs if start < self._length]

    def take_new_text(self) -> str:
        """Return the text that was added since the last call."""
        new, self._num_taken = self._pieces[self._num_taken :], len(self._pieces)
        return "".join(new)

    def add(self, tokens: Sequence[int], log_probs: Sequence[float]) -> None:
        """Append tokens; drop all that follows a stop sequence."""
        for token, log_prob in zip(tokens, log_probs, strict=True):
            if self.is_finished:
                return
            self._log_probs.append((self._length + len(self._held), log_prob))
            self._held += self._decode([token])
            found = [self._held.find(stop) for stop in self._stops if stop in self._held]
            self._release(min(found) if found else len(self._held) - self._count_undecided())
            self.is_finished = bool(found)

    def finish(self) -> None:
        """Release the text held back, as no further token can complete a stop sequence."""
        if not self.is_finished:
            self._release(len(self._held))
            self.is_finished = True

    def _release(self, length: int) -> None:
        """Move `length` characters from the text held back to `text`."""
        if length > 0:
            self._pieces.append(self._held[:length])
            self._held = self._held[length:]
            self._length += length

    def _count_undecided(self) -> int:
        """Return how many of the last characters may begin a stop sequence."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for length in range(min(longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


class TextGenerator:
    """Continues prompts by one model and one way of sampling.

    Args:
        stream: `generate.stream_tokens` of the model, which takes ids and `seeds`.
        tokenizer: the model's.
        block_size: the model's context T.
        config: the number of samples, the first seed, and how to treat unknown characters.
    """

    def __init__(
        self,
        stream: Callable[..., Iterator[tuple["Tensor", "Tensor"]]],
        tokenizer: Tokenizer,
        block_size: int,
        config: InferenceConfig,
    ):
        self._stream, self._tokenizer, self._block_size = stream, tokenizer, block_size
        self._config = config
        self._seed = config.seed  # of the first sample

    def print_samples(self, prompt: str, stops: Sequence[str], output: Output) -> None:
        """Print the first sample token by token, then the others."""
        prompt, ids = self._encode(prompt, output)
        samples = [Sample(self._tokenizer, stops) for _ in range(self._config.num_samples)]
        printer = SamplePrinter(output)
        printer.print(prompt)
        try:
            for _ in self._generate(ids, samples):
                printer.print(samples[0].take_new_text())
                if output.quiet:  # standard output was closed
                    return
        except KeyboardInterrupt:
            output.print()
            raise
        printer.print(samples[0].take_new_text())
        output.print()
        for sample in samples[1:]:
            output.print("---")
            output.print((prompt + sample.text).strip("\n"))

    def generate_json(self, prompt: str, stops: Sequence[str], output: Output) -> dict[str, Any]:
        """Generate the samples; return the first one's fields, and a list if there are several."""
        prompt, ids = self._encode(prompt, output)
        samples = [Sample(self._tokenizer, stops) for _ in range(self._config.num_samples)]
        arrivals = [(time.perf_counter(), number) for number in self._generate(ids, samples)]
        results = [
            {"text": prompt + s.text, "log_probs": s.log_probs, "seed": self._seed + k}
            for k, s in enumerate(samples)
        ]
        # The first tokens include the prefill: count those after them.
        decoded = sum(number for _, number in arrivals[1:])
        seconds = arrivals[-1][0] - arrivals[0][0] if decoded else 0.0
        speed = {"tokens_per_second": decoded / seconds if decoded else None}
        several = {"samples": results} if len(results) > 1 else {}
        return {"prompt": prompt, **results[0], **speed, **several}

    def advance_seed(self) -> None:
        """Use other seeds from here on, so that the same prompt is continued otherwise."""
        self._seed += self._config.num_samples

    def _encode(self, prompt: str, output: Output) -> tuple[str, np.ndarray]:
        """Return the prompt without unknown characters, and its ids; note all changes to it."""
        tokenizer, config = self._tokenizer, self._config
        if config.on_unknown != "error":
            is_replaced = config.on_unknown == "replace"
            prompt, number = remove_unknown(tokenizer, prompt, is_replaced)
            if number:
                done = "replaced" if is_replaced else "skipped"
                characters = pluralize(number, "character")
                output.print_note(
                    f"{done} {characters} of the prompt that are not in the vocabulary"
                )
        if not prompt:
            prompt = tokenizer.default_prompt
            start = "a new line" if prompt == "\n" else repr(prompt)
            output.print_note(f"no prompt: starting with {start}")
        ids = tokenizer.encode(prompt)
        if len(ids) > self._block_size:
            length = pluralize(len(ids), tokenizer.unit)
            output.print_note(
                f"the prompt has {length}: the model sees the last {self._block_size}"
            )
        return prompt, ids

    def _generate(self, ids: np.ndarray, samples: Sequence[Sample]) -> Iterator[int]:
        """Extend the samples until all are finished; yield the number of tokens of each call."""
        seeds = [self._seed + k for k in range(len(samples))]
        with contextlib.closing(self._stream(ids, seeds=seeds)) as stream:
            for tokens, log_probs in stream:
                rows = zip(samples, tokens.tolist(), log_probs.tolist(), strict=True)
                for sample, row_tokens, row_log_probs in rows:
                    sample.add(row_tokens, row_log_probs)
                yield tokens.numel()
                if all(sample.is_finished for sample in samples):
                    break
        for sample in samples:
            sample.finish()


class SamplePrinter:
    """Prints a text piece by piece, without its leading and trailing new lines."""

    def __init__(self, output: Output):
        self._output = output
        self._has_begun, self._new_lines = False, ""

    def print(self, piece: str) -> None:
        """Print the next piece, but keep its last new lines until text follows."""
        text = self._new_lines + piece if self._has_begun else piece.lstrip("\n")
        shown = text.rstrip("\n")
        self._new_lines = text[len(shown) :]
        if shown:
            self._has_begun = True
            self._output.print_piece(shown)


def prompt_repeatedly(generator: TextGenerator, stops: Sequence[str], output: Output) -> None:
    """Ask for one prompt after another and continue each, with new seeds each time.

    Ctrl-C ends a sample or discards a line; Ctrl-D ends the loop.
    """
    is_terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are not text: unknown characters
        sys.stdin.reconfigure(errors="surrogateescape")
    if is_terminal:
        with contextlib.suppress(ImportError):  # not on Windows, whose console edits lines itself
            import readline  # noqa: F401  # gives input() arrow keys and a history
        output.print_note("type a text to continue; Ctrl-C ends a sample, Ctrl-D ends the program")
    while True:
        try:
            prompt = input("> " if is_terminal else "")
        except EOFError:
            if is_terminal:
                output.print()
            return
        except KeyboardInterrupt:
            output.print()
            continue
        try:
            generator.print_samples(unescape(prompt), stops, output)
        except UserError as error:
            for problem in error.problems:
                output.print_error(problem)
        except KeyboardInterrupt:
            output.print_note("stopped")
        generator.advance_seed()


def main(argv: Sequence[str]) -> int:
    """Generate text: resolve the settings, load the model, then print samples."""
    command_line = CommandLine(__doc__, InferenceConfig, ACTIONS, operands=OPERAND)
    flags, actions, problems = command_line.parse(argv)
    if problems := problems + find_conflicts(flags, actions):
        raise UserError(*problems)
    config = InferenceConfig(**flags)
    directory = find_model(config, actions.get("model"))
    is_interactive = "interactive" in actions
    prompt = "" if is_interactive else read_prompt(config)
    stops = [unescape(text) for text in actions.get("stop", [])]
    output = Output()

    # These bring torch: imported once the settings are known to be good.
    from checkpoint import load_model_from_bundle
    from fast_decode import choose_decoding, compile_decode
    from generate import SamplingParams, stream_tokens
    from utils.device import choose_device, is_out_of_memory
    from utils.kernels import quantize

    try:
        device = choose_device(config.device)
        bundle = read_bundle(directory, WEIGHTS_FILE)
        model, tokenizer = load_model_from_bundle(bundle, device)
        output.print_note(format_source(directory, bundle.state.step))
        if config.quantize == "int8":
            quantize(model)
        sampling = SamplingParams(**{name: getattr(config, name) for name in SAMPLING_SETTINGS})
        expected = 0 if stops or is_interactive else config.max_new_tokens  # 0: unknown
        wanted = choose_decoding(config.torch_compile, device, expected)
        if wanted.mode != "off":
            output.print_note("compiling, which may take a minute or two")
        fast, compiled, seconds = compile_decode(
            model, wanted, config.torch_compile, sampling, rows=config.num_samples
        )
        if compiled.fell_back:
            output.print_note(f"not compiled: {compiled.reason}")
        elif fast is not None:
            output.print_note(f"compiled in {seconds:.0f} s")
        settings = {"max_new_tokens": config.max_new_tokens, "sampling": sampling, "fast": fast}
        stream = functools.partial(stream_tokens, model, **settings)
        generator = TextGenerator(stream, tokenizer, model.block_size, config)
        if "json" in actions:
            facts = {"model": str(directory), "step": bundle.state.step, **asdict(sampling)}
            facts |= {"quantize": config.quantize, "compiled_by": compiled.mode}
            result = generator.generate_json(prompt, stops, Output())
            output.print(json.dumps({**facts, **result}))
        elif is_interactive:
            prompt_repeatedly(generator, stops, output)
        else:
            generator.print_samples(prompt, stops, output)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        samples = pluralize(config.num_samples, "sample")
        raise UserError(f"{samples} at once do not fit into memory: generate fewer") from error
    return output.exit_status


if __name__ == "__main__":
    sys.exit(run_command(main))
