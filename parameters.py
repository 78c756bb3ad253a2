"""Every setting of Folio: its meaning, its one default and its legal range.

`ModelConfig` is the whole schema. The command line's flags and `--help`, the checks on
configuration files and the editor's completion are all generated from it. The sentence under
a setting is its documentation, everywhere.

    python parameters.py > configs/schema.json     # the JSON Schema that editors use
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

MAX_COUNT = 2**31 - 1  # of any count: what is larger is a slip of the finger
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
DEVICE_PATTERN = r"^(auto|cpu|mps|cuda(:(0|[1-9][0-9]?))?)$"
Device = Annotated[str, Field(pattern=DEVICE_PATTERN)]
# YAML takes the words on and off for true and false.
Switch = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(
        lambda value: {"true": "on", "false": "off"}.get(str(value).lower(), value),
        json_schema_input_type=Literal["auto", "on", "off", True, False],
    ),
]
# A directory's name on every system; nothing that it may hold can lead out of its parent.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
ModelName = Annotated[str, Field(pattern=NAME_PATTERN, max_length=100)]


class Settings(BaseModel):
    """What all settings share: no unknown keys, no silent conversions, no NaN, no assignment."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Architecture(Settings):
    """The network. Its shape is fixed for the life of a model."""

    architecture: Literal["modern", "gpt2"] = "modern"
    """The network: modern (Qwen3's parts: rotary positions, RMSNorm, gated MLP), or gpt2."""

    block_size: Positive = 256
    """Context length T, in tokens: how far back the model sees."""

    n_embd: Positive = 128
    """Channels C: the width of the network. Must be divisible by n_head."""

    n_head: Positive = 4
    """Attention heads H in each layer."""

    n_layer: Positive = 3
    """Transformer blocks L."""

    dropout: Fraction = 0.0
    """Probability of dropping an activation while training. Raise it when val loss rises."""

    bias: bool = False
    """Whether linear layers and LayerNorms have a bias. modern has none."""

    tie_weights: bool | None = None
    """Whether the head shares the token embedding's weights. null: in gpt2, not in modern."""

    activation: Literal["silu", "gelu", "gelu_tanh"] | None = None
    """The MLP's non-linearity. null: silu in modern, where it gates, and gelu in gpt2."""

    rope_theta: Annotated[float, Field(gt=1, le=1e9)] = 1000.0
    """The base of the wavelengths of modern's rotary positions."""


class Data(Settings):
    """The text, and how it is divided."""

    data: Annotated[str, Field(min_length=1)] | None = None
    """UTF-8 text: file, directory, glob or - (stdin). null: input.txt if any, else Shakespeare."""

    train_split: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Fraction of the text, from its beginning, to learn from. What is left is for validation."""

    test_split: Fraction = 0.0
    """Fraction of the text, at its end, held out of both training and validation."""

    split_by: Literal["position", "file"] = "position"
    """Cut the text where the fractions say, or at the nearest end of a file."""

    window_order: Literal["random", "shuffled"] = "random"
    """Windows at random, or shuffled: side by side, each once in a pass, in an order of its own."""

    token_store: Switch = "auto"
    """Keep the text's ids on disk, in cache_dir, and map them. auto: from 64 MB of text on."""

    tokenizer: Literal["char", "gpt2"] = "char"
    """char: a token for each character of the text. gpt2: GPT-2's byte pairs (extra gpt2)."""

    on_new_chars: Literal["error", "drop", "extend"] = "error"
    """Characters that the model begun from lacks: error, drop them, or extend its vocabulary."""


class Training(Settings):
    """How the model learns."""

    batch_size: Positive = 8
    """Sequences in one step (one optimizer update), whatever the number of devices."""

    micro_batch_size: Positive | None = None
    """Sequences that a process has in memory at once; the step accumulates them. null: all."""

    max_iters: Positive | None = 880
    """Steps to train. null: as epochs or max_minutes say."""

    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Instead of max_iters: passes over the training text."""

    max_minutes: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Instead of max_iters: train for about this long. Set beside it: stop at what comes first."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """adamw, or muon for the matrices of the blocks and adamw for the rest."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    """The highest learning rate, in AdamW's meaning; Muon's is twice it."""

    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] = "wsd"
    """From learning_rate to min_lr after the warm-up. wsd: stable first, then a line."""

    warmup_iters: Count = 20
    """Steps over which the learning rate rises to learning_rate."""

    min_lr: Annotated[float, Field(ge=0)] | None = 0.0
    """The learning rate at the end of the schedule. null: learning_rate / 10."""

    lr_decay_iters: Positive | None = None
    """The step at which the schedule reaches min_lr. null: max_iters."""

    lr_decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.7
    """wsd: the part of the schedule, at its end, in which the learning rate falls."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay, on matrices alone: biases and norms are left free."""

    beta1: Fraction = 0.8
    """AdamW's decay of the gradient's running mean."""

    beta2: Fraction = 0.99
    """AdamW's decay of the squared gradient's running mean."""

    muon_momentum: Fraction = 0.95
    """Muon's decay of the gradient's running mean."""

    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """The gradient is scaled down to this norm where it is longer. 0: never."""

    eval_interval: Count = 220
    """Steps between evaluations; the last step is always evaluated. 0: the last step alone."""

    eval_iters: Count = 20
    """Batches in an evaluation of a split, always the same. 0: all of val, as much of train."""

    early_stopping_patience: Count = 0
    """Stop when val loss has not fallen for so many evaluations. 0: train to the end."""

    seed: Seed = 1337
    """Initial weights, batches, dropout and samples follow from it; evaluation never does."""


class Saving(Settings):
    """Which checkpoints are made, and which of them are kept."""

    checkpoint_interval: Count = 220
    """Steps between checkpoints. 0: only each new best, a run's last step, and on a signal."""

    keep_checkpoints: Positive | None = 2
    """How many checkpoints a run keeps beside its best; older ones are removed. null: all."""

    keep_every: Count = 0
    """Checkpoints at multiples of so many steps are made, and kept for good. 0: none."""


class Runtime(Settings):
    """The machine. Changes rounding, and between kinds of device what dropout draws; no more."""

    device: Device = "auto"
    """auto (CUDA, else MPS, else CPU), cpu, mps, cuda or cuda:N."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How the processes of torchrun share a model. ddp: each has all of it; fsdp: each a part."""

    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of each process. null: as many as PyTorch chooses."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of matrix products. auto: bf16 where the processor multiplies in it, else fp32."""

    torch_compile: Switch = "auto"
    """Train through torch.compile. auto: where that pays back within the run, and works."""

    compile_backend: Literal["auto", "inductor", "aot_eager"] = "auto"
    """torch.compile's backend. auto: inductor, and aot_eager on MPS."""


class Tracking(Settings):
    """What is shown and logged while a run goes on."""

    log_interval: Positive = 50
    """Steps from one printed line to the next, at most; every step is logged."""

    sample_interval: Count = 500
    """Show generated text at the first evaluation after so many steps. 0: at the end only."""

    histogram_interval: Count = 250
    """Steps between histograms of all weights and gradients. 0: none."""

    aim_logging: bool = False
    """Whether to log to Aim as well (extra aim)."""


class Run(Settings):
    """What a run is called and where it is kept. A rerun of its record has its own."""

    run_tag: str | None = None
    """A word for the run directory's name, after the time."""

    runs_dir: str = Field(default="runs", min_length=1)
    """Where run directories are made."""

    aim_repo: str | None = Field(default=None, min_length=1)
    """Where Aim keeps runs: a directory, or aim://host:port. null: .aim beside runs_dir."""

    model_name: ModelName | None = None
    """Train this model in checkpoints_dir: go on where it stands, or begin it."""

    checkpoints_dir: str = Field(default="checkpoints", min_length=1)
    """Where named models are kept."""

    cache_dir: str | None = Field(default=None, min_length=1)
    """Where token stores, standard input and the sample corpus are kept. null: the user's cache."""


class Initialization(Settings):
    """What a new model begins with. Resuming is a flag of its own: --resume."""

    init_from: str | None = Field(default=None, min_length=1)
    """Fine-tune: begin with the weights and tokenizer of this named model, run or bundle."""


GROUPS: dict[str, type[Settings]] = {
    group.__name__.lower(): group
    for group in (Architecture, Data, Training, Saving, Runtime, Tracking, Initialization, Run)
}
ALIASES = {"input_file": "data"}
# What an architecture takes for a setting that is null.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "modern": {"tie_weights": False, "activation": "silu"},
    "gpt2": {"tie_weights": True, "activation": "gelu"},
}
DERIVED = frozenset(name for own in ARCHITECTURES.values() for name in own)


class ModelConfig(Run, Initialization, Tracking, Runtime, Saving, Training, Data, Architecture):
    """Every setting of a run, checked. The bases stand in reverse, as pydantic takes them."""

    @model_validator(mode="before")
    @classmethod
    def _length_replaces_default(cls, values: Any) -> Any:
        """Let `epochs` or `max_minutes` alone stand for the default `max_iters`."""
        if isinstance(values, dict) and "max_iters" not in values:
            if values.get("epochs") is not None or values.get("max_minutes") is not None:
                return {**values, "max_iters": None}
        return values

    @model_validator(mode="after")
    def _no_conflicts(self, info: ValidationInfo) -> "ModelConfig":
        # One layer of a configuration is checked on its own; its values meet the others' later.
        if not (info.context and info.context.get("one_layer")):
            if problems := [problem for _, problem in find_conflicts(self.model_dump())]:
                raise ValueError("; ".join(problems))
            # Settled here, and not among `model_fields_set`: nobody has set them.
            own = ARCHITECTURES[self.architecture].items()
            self.__dict__.update({n: value for n, value in own if getattr(self, n) is None})
        return self


def find_conflicts(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (settings, problem) for legal values that do not go together.

    `values` may lack settings that were already found wrong; rules about them are skipped.
    """

    def given(*names: str) -> bool:
        return all(values.get(name) is not None for name in names)

    if given("n_embd", "n_head") and values["n_embd"] % values["n_head"]:
        yield (
            ("n_embd", "n_head"),
            f"n_embd {values['n_embd']} is not divisible by n_head {values['n_head']}",
        )
    if values.get("architecture") == "modern":
        if values.get("bias"):
            yield (
                ("architecture", "bias"),
                "architecture modern has no biases: set bias to false, or architecture to gpt2",
            )
        if given("n_embd", "n_head") and values["n_embd"] / values["n_head"] % 2 == 1:
            yield (
                ("architecture", "n_embd", "n_head"),
                f"architecture modern turns pairs of channels, and n_embd {values['n_embd']} "
                f"gives each of {values['n_head']} heads an odd number of them",
            )
    if given("train_split", "test_split") and values["train_split"] + values["test_split"] >= 1:
        yield (
            ("train_split", "test_split"),
            f"train_split {values['train_split']:g} and test_split {values['test_split']:g} "
            "leave nothing for validation: their sum must be below 1",
        )
    if given("min_lr", "learning_rate") and values["min_lr"] > values["learning_rate"]:
        yield (
            ("min_lr", "learning_rate"),
            f"min_lr {values['min_lr']:g} is above learning_rate {values['learning_rate']:g}",
        )
    if given("max_iters", "epochs"):
        yield (
            ("max_iters", "epochs"),
            "max_iters and epochs both say how long to train: set one of them to null",
        )
    lengths = ("max_iters", "epochs", "max_minutes")
    if all(name in values for name in lengths) and not any(map(given, lengths)):
        yield (
            ("max_iters",),
            "nothing says how long to train: set max_iters, epochs or max_minutes",
        )


def build_json_schema() -> dict[str, Any]:
    """The JSON Schema of a configuration file, for editors."""
    schema = ModelConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Folio configuration"
    schema["description"] = "A configuration file of Folio: flat keys, each one optional."
    schema["properties"]["$schema"] = {"type": "string"}
    for alias, name in ALIASES.items():
        schema["properties"][alias] = schema["properties"][name]
    return schema


if __name__ == "__main__":
    import json

    print(json.dumps(build_json_schema(), indent=2, ensure_ascii=False))
