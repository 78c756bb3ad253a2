"""Generate text with a trained model.

    python inference.py --prompt "ROMEO:"
    python inference.py runs/20260131_235959_baseline --temperature 0.7 --num-samples 3
    python inference.py --model-name dante --interactive
    printf "To be" | python inference.py --prompt - --json

All it needs is a bundle, wherever that was moved to.
"""

import contextlib
import io
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

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
from utils.files import decode_text, read_file
from utils.output import Output, pluralize, run_command

if TYPE_CHECKING:
    from model import LanguageModel

STANDARD_INPUT = "-"


class InferenceConfig(Settings):
    """What to generate, and from which model."""

    run: Annotated[str, Field(min_length=1)] | None = None
    """A run's id or directory, or a bundle anywhere. null: the newest run in runs_dir."""

    model_name: ModelName | None = None
    """A named model, instead of a run."""

    runs_dir: str = "runs"
    """Where runs are looked for."""

    checkpoints_dir: str = "checkpoints"
    """Where named models are looked for."""

    prompt: str = ""
    """The text to continue; \\n is a new line, and - standard input. Empty: a new line."""

    prompt_file: Annotated[str, Field(min_length=1)] | None = None
    """A file with the text to continue, taken as it is."""

    on_unknown: Literal["error", "skip", "replace"] = "error"
    """What the model has never seen in a prompt: error, skip, or replace (by a space if it can)."""

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


def main(argv: Sequence[str]) -> int:
    """The command: settle the settings, load the model, and let it speak."""
    command_line = CommandLine(__doc__, InferenceConfig, ACTIONS, operands=OPERAND)
    flags, actions, problems = command_line.parse(argv)
    if problems := problems + conflicts(flags, actions):
        raise UserError(*problems)
    config = InferenceConfig(**flags)
    directory = find_model(config, actions.get("model"))
    prompt = "" if "interactive" in actions else given_prompt(config)
    stops = [unescaped(text) for text in actions.get("stop", [])]
    output = Output()

    may_end_early = bool(stops) or "interactive" in actions
    with memory_explained(config):
        speaker = load_speaker(config, directory, may_end_early, output)
        if "json" in actions:
            output.print(json.dumps(speaker.as_json(prompt, stops)))
        elif "interactive" in actions:
            converse(speaker, stops, output)
        else:
            speaker.speak(prompt, stops, output)
    return output.exit_status


@contextlib.contextmanager
def memory_explained(config: InferenceConfig) -> Iterator[None]:
    """A lack of memory as the user's mistake that it is."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        from utils.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        samples = pluralize(config.num_samples, "sample")
        raise UserError(f"{samples} at once do not fit into memory: take fewer") from error


def conflicts(flags: dict[str, Any], actions: dict[str, Any]) -> list[str]:
    """Flags that cannot stand together."""
    problems = []
    if sys.stdin is None and ("interactive" in actions or flags.get("prompt") == STANDARD_INPUT):
        problems.append("standard input is closed")
    if "interactive" in actions:
        others = {"json": "json" in actions, "prompt": "prompt" in flags}
        others["prompt-file"] = flags.get("prompt_file") is not None
        names = [f"--{name}" for name, is_there in others.items() if is_there]
        problems += [f"--interactive asks for prompts: leave {name} out" for name in names]
    if "prompt" in flags and flags.get("prompt_file") is not None:
        problems.append("--prompt and --prompt-file both give a prompt: choose one")
    if "" in actions.get("stop", []):
        problems.append("--stop must not be empty")
    return problems


# ----------------------------------------------------------------------------------------------
# What is asked for


class ModelChoice(Protocol):
    """The settings that say which model is meant."""

    run: str | None
    model_name: str | None
    runs_dir: str
    checkpoints_dir: str


def find_model(config: ModelChoice, operands: Sequence[str] | None = None) -> Path:
    """The bundle that the settings, or a word without a flag, name.

    Raises `UserError` where there is none, or where more than one is named.
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


def given_prompt(config: InferenceConfig) -> str:
    """The text to continue. Raises `UserError` where a file, or standard input, has none."""
    if config.prompt_file is not None:
        return decode_text(read_file(Path(config.prompt_file)), config.prompt_file)
    if config.prompt == STANDARD_INPUT:
        content = sys.stdin.buffer.read()
        return decode_text(content, "standard input") if content else ""
    return unescaped(config.prompt)


def unescaped(text: str) -> str:
    r"""The text that was meant: `\n` is a new line, `\t` a tabulator, `\\` a backslash."""
    meanings = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda match: meanings[match[1]], text)


# ----------------------------------------------------------------------------------------------
# Speaking


def load_speaker(
    config: InferenceConfig, directory: Path, may_end_early: bool, output: Output
) -> "Speaker":
    """The model that stands in `directory`, as fast as the settings want it."""
    # Only here is torch imported: help and mistakes are answered at once.
    from checkpoint import load_model_from_bundle
    from decoding import choose_decoding, compile_decode, quantize
    from sampling import SamplingParams
    from utils.device import choose_device

    device = choose_device(config.device)
    bundle = read_bundle(directory, WEIGHTS_FILE)
    model, tokenizer = load_model_from_bundle(bundle, device)
    output.print_note(f"{directory}, step {bundle.state.step}{without_export(directory)}")
    if config.quantize == "int8":
        quantize(model)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = SamplingParams(**{name: getattr(config, name) for name in names})
    expected = 0 if may_end_early else config.max_new_tokens
    wanted = choose_decoding(config.torch_compile, device, expected)
    if wanted.mode != "off":
        output.print_note("compiling, which may take a minute or two")
    fast, compiled, seconds = compile_decode(
        model,
        wanted,
        config.torch_compile,
        sampling,
        rows=config.num_samples,
    )
    if compiled.fell_back:
        output.print_note(f"not compiled: {compiled.reason}")
    elif fast is not None:
        output.print_note(f"compiled in {seconds:.0f} s")
    facts = {"model": str(directory), "step": bundle.state.step}
    facts |= {**asdict(sampling), "quantize": config.quantize, "compiled_by": compiled.mode}
    return Speaker(model, tokenizer, sampling, config, fast, facts)


def without_export(directory: Path) -> str:
    """A remark where `directory` is a checkpoint that stands in for what its run has not yet."""
    run = find_run_of(directory)
    if run is None or (run / "artifacts" / "export").exists():
        return ""
    if directory != list_checkpoints(run)[-1]:  # an older one, which somebody named
        return ""
    return ": its run has no export yet, and this is its newest checkpoint"


class Speaker:
    """A model that continues texts as the settings say."""

    def __init__(
        self,
        model: "LanguageModel",
        tokenizer: Tokenizer,
        sampling: "SamplingParams",
        config: InferenceConfig,
        fast: "FastDecoder | None",
        facts: dict[str, Any],
    ):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.config, self.fast, self.facts = config, fast, facts
        self._seed = config.seed

    def speak(self, prompt: str, stops: Sequence[str], output: Output) -> None:
        """Print the samples: the first as it comes, the others as they stand then."""
        prompt, ids = self._read(prompt, output)
        samples = [Sample(self.tokenizer, stops) for _ in range(self.config.num_samples)]
        printer = Printer(output)
        printer.write(prompt)
        try:
            for _ in self._continue(ids, samples):
                printer.write(samples[0].news())
                if output.quiet:  # whoever was reading has gone
                    return
        except KeyboardInterrupt:
            output.print()
            raise
        printer.write(samples[0].news())
        output.print()
        for sample in samples[1:]:
            output.print("---")
            output.print((prompt + sample.text).strip("\n"))

    def as_json(self, prompt: str, stops: Sequence[str]) -> dict[str, Any]:
        """The samples for programs: the first one outermost, and all of several beside it."""
        prompt, ids = self._read(prompt, Output())
        samples = [Sample(self.tokenizer, stops) for _ in range(self.config.num_samples)]
        arrivals = [(time.perf_counter(), number) for number in self._continue(ids, samples)]
        said = [
            {"text": prompt + s.text, "log_probs": s.log_probs, "seed": self.config.seed + k}
            for k, s in enumerate(samples)
        ]
        # The first tokens wait for the prompt to be read: what is counted comes after them.
        decoded = sum(number for _, number in arrivals[1:])
        seconds = arrivals[-1][0] - arrivals[0][0] if decoded else 0.0
        speed = {"tokens_per_second": decoded / seconds if decoded else None}
        all_of_them = {"samples": said} if len(said) > 1 else {}
        return {**self.facts, "prompt": prompt, **said[0], **speed, **all_of_them}

    def _read(self, prompt: str, output: Output) -> tuple[str, Any]:
        """The prompt as the model can read it, and its ids; says what had to be done for that."""
        if self.config.on_unknown != "error":
            replace = self.config.on_unknown == "replace"
            prompt, number = remove_unknown(self.tokenizer, prompt, replace)
            if number:
                done = "replaced" if replace else "skipped"
                characters = pluralize(number, "character")
                output.print_note(f"{done} {characters} of the prompt that the model does not know")
        if not prompt:
            prompt = self.tokenizer.default_prompt
            begin = "on a new line" if prompt == "\n" else f"with {prompt!r}"
            output.print_note(f"no prompt: it begins {begin}")
        ids = self.tokenizer.encode(prompt)
        T = self.model.block_size
        if len(ids) > T:
            unit = self.tokenizer.unit
            output.print_note(
                f"the prompt has {pluralize(len(ids), unit)}: the model sees the last {T}"
            )
        return prompt, ids

    def _continue(self, ids: Any, samples: "Sequence[Sample]") -> Iterator[int]:
        """Give each sample its tokens as they come, until all have ended; how many came."""
        stream = self.model.stream(
            ids,
            self.config.max_new_tokens,
            self.sampling,
            seeds=[self._seed + k for k in range(len(samples))],
            fast=self.fast,
        )
        with contextlib.closing(stream):
            for tokens, log_probs in stream:
                rows = zip(samples, tokens.tolist(), log_probs.tolist(), strict=True)
                for sample, its_tokens, its_log_probs in rows:
                    sample.add(its_tokens, its_log_probs)
                yield tokens.numel()
                if all(sample.ended for sample in samples):
                    break
        for sample in samples:
            sample.finish()

    def next_seed(self) -> None:
        """From here on, other texts: the same prompt may be given again."""
        self._seed += self.config.num_samples


class Sample:
    """What a model adds to a prompt, up to the first of the stop strings.

    What may yet become a stop string is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self.ended = False
        self._decode = tokenizer.create_stream_decoder()
        self._stops, self._held = stops, ""
        self._pieces: list[str] = []
        self._length = self._told = 0  # characters given, and pieces that `news` told of
        self._log_probs: list[tuple[int, float]] = []  # with where in the text their tokens begin

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self._pieces)

    @property
    def log_probs(self) -> list[float]:
        """The model's logarithm of the probability of each token that `text` has something of."""
        return [log_prob for begin, log_prob in self._log_probs if begin < self._length]

    def news(self) -> str:
        """What is new in the text since the last call."""
        new, self._told = self._pieces[self._told :], len(self._pieces)
        return "".join(new)

    def add(self, tokens: list[int], log_probs: list[float]) -> None:
        """Take the next tokens; what comes after a stop string is left out."""
        for token, log_prob in zip(tokens, log_probs, strict=True):
            if self.ended:
                return
            self._log_probs.append((self._length + len(self._held), log_prob))
            self._held += self._decode([token])
            found = [self._held.find(stop) for stop in self._stops if stop in self._held]
            if found:
                self._give(min(found))
                self.ended = True
            else:
                self._give(len(self._held) - self._begun())

    def finish(self) -> None:
        """No token follows: what was held back was no stop string."""
        if not self.ended:
            self._give(len(self._held))
            self.ended = True

    def _give(self, length: int) -> None:
        if length > 0:
            self._pieces.append(self._held[:length])
            self._held = self._held[length:]
            self._length += length

    def _begun(self) -> int:
        """How many of the characters held last could be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for length in range(min(longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


class Printer:
    """Prints a text piece by piece, without the empty lines before and after it."""

    def __init__(self, output: Output):
        self._output = output
        self._has_begun, self._new_lines = False, ""

    def write(self, piece: str) -> None:
        """Print what comes next; new lines wait until something follows them."""
        text = self._new_lines + piece if self._has_begun else piece.lstrip("\n")
        shown = text.rstrip("\n")
        self._new_lines = text[len(shown) :]
        if shown:
            self._has_begun = True
            self._output.print_piece(shown)


def converse(speaker: Speaker, stops: Sequence[str], output: Output) -> None:
    """Continue one prompt after another, until there is none.

    Ctrl-C ends a text, or takes a line back; Ctrl-D ends the conversation.
    """
    is_asked = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is not text is an unknown character
        sys.stdin.reconfigure(errors="surrogateescape")
    if is_asked:
        with contextlib.suppress(ImportError):  # Windows has none, and a history of its own
            import readline  # noqa: F401  # gives input() its arrow keys and its history
        output.print_note(
            "type a text to be continued; Ctrl-C ends it, Ctrl-D ends the conversation"
        )
    while True:
        try:
            prompt = input("> " if is_asked else "")
        except EOFError:
            if is_asked:
                output.print()
            return
        except KeyboardInterrupt:
            output.print()
            continue
        try:
            speaker.speak(unescaped(prompt), stops, output)
        except UserError as error:
            for problem in error.problems:
                output.print_error(problem)
        except KeyboardInterrupt:
            output.print_note("stopped")
        speaker.next_seed()


if __name__ == "__main__":
    sys.exit(run_command(main))
