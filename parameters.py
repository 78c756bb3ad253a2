"""Every setting of Folio: its meaning, its one default and its legal range.

`ModelConfig` defines all settings. The command-line flags and `--help`, the checks on configuration
files and editor autocompletion are generated from it. Each field's docstring is its `--help` text
and its description in the schema.

    python parameters.py > configs/schema.json     # the JSON Schema that editors use
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)

MAX_COUNT = 2**31 - 1  # reject larger counts as typos
DEFAULT_VOCAB_SIZE = 1024  # of tokenizer bpe (docs/LOG.md)
MAX_VOCAB_SIZE = 1 << 16  # of tokenizer bpe, so that an id takes two bytes
MAX_RATE = 1e20  # so that its product with an optimizer's factors is in float32's range
# Hash multipliers of the ids of a token and of those before it, oldest first, for the last two,
# three and four tokens (model.NgramEmbedding). Sums are below 2^53, so exact in JavaScript too.
NGRAM_FACTORS = (
    (0, 0, 1273642419, 2038074743),
    (0, 1500450271, 715225739, 1299709),
    (472882027, 982451653, 334214459, 1076363779),
)
NGRAM_REACH = len(NGRAM_FACTORS)  # tokens before the last one
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
DEVICE_PATTERN = r"^(auto|cpu|mps|cuda(:(0|[1-9][0-9]?))?)$"
Device = Annotated[str, Field(pattern=DEVICE_PATTERN)]
# YAML 1.1 reads bare on and off as booleans: map them back.
Switch = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(
        lambda value: {"true": "on", "false": "off"}.get(str(value).lower(), value),
        json_schema_input_type=Literal["auto", "on", "off", True, False],
    ),
]
# A portable directory name without path separators.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
RESERVED_NAME = r"(?i)(con|prn|aux|nul|(com|lpt)\d)(\..*)?"  # on Windows, with any suffix
FLAG_WORDS = ("auto", "last", "null")  # mean something else as a flag's value


def _check_name(name: str) -> str:
    if re.fullmatch(RESERVED_NAME, name) or name.endswith("."):
        raise ValueError(
            "must be a name that every system can hold, not a device's or one with a final dot"
        )
    if name.lower() in FLAG_WORDS:
        raise ValueError("must not be a word that flags such as --resume give another meaning")
    return name


def _check_path(path: Any) -> Any:
    """Reject text that no file name can hold. Python escapes other bytes as U+DC80 to U+DCFF."""
    if isinstance(path, str) and re.search(r"[\0\ud800-\udc7f\udd00-\udfff]", path):
        raise ValueError("must be valid Unicode text without NUL characters")
    return path


ModelName = Annotated[str, Field(pattern=NAME_PATTERN, max_length=100), AfterValidator(_check_name)]
PathText = Annotated[str, Field(min_length=1), BeforeValidator(_check_path)]


class Settings(BaseModel):
    """Base of all settings: no unknown keys, no type coercion, no NaN, immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Architecture(Settings):
    """The network. Its shape cannot change once a model exists."""

    architecture: Literal["modern", "gpt2", "speedrun"] = "modern"
    """modern (Qwen3's), gpt2, or speedrun: modern with n-gram embeddings, not for every export."""

    block_size: Positive = 256
    """Context length T, in tokens."""

    n_embd: Positive = 128
    """Embedding size C, the width of the network. Must be divisible by n_head."""

    n_head: Positive = 4
    """Number of attention heads H in each layer."""

    n_layer: Positive = 3
    """Number of transformer blocks L."""

    dropout: Fraction = 0.0
    """Dropout probability during training. Raise it if the model overfits."""

    bias: bool = False
    """Whether linear layers and LayerNorms have a bias; gpt2 only."""

    tie_weights: bool | None = None
    """Whether the LM head shares the token embedding's weights. null: yes in gpt2, else no."""

    activation: Literal["silu", "gelu", "gelu_tanh"] | None = None
    """The MLP's activation function. null: gelu in gpt2, else silu."""

    rope_theta: Annotated[float, Field(gt=1, le=1e9)] = 1000.0
    """Base (theta) of the rotary embeddings; not in gpt2."""

    ngram_rows: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    """Rows of the table of n-gram embeddings; speedrun only. null: 16384 in speedrun."""


class Data(Settings):
    """The text, and how it is split."""

    data: PathText | None = None
    """UTF-8 text: file, directory, glob or - (stdin). null: input.txt, else Shakespeare."""

    train_split: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Fraction of the text, from its start, to train on. The rest is for validation."""

    test_split: Fraction = 0.0
    """Fraction of the text, at its end, held out of training and validation."""

    split_by: Literal["position", "file"] = "position"
    """position: split exactly at the fractions. file: at the nearest file boundary."""

    window_order: Literal["random", "shuffled", "shifted"] = "shifted"
    """random: at any offset. shuffled: each window once per epoch. shifted: cut anew each epoch."""

    token_store: Switch = "auto"
    """Store token ids in cache_dir and memory-map them. auto: for 64 MB of text or more."""

    tokenizer: Literal["char", "gpt2", "bpe"] = "char"
    """char: the text's characters. gpt2: GPT-2's BPE (extra gpt2). bpe: its own (extra bpe)."""

    vocab_size: Annotated[int, Field(ge=257, le=MAX_VOCAB_SIZE)] | None = None
    """Tokens of bpe, trained on the training split; 256 are bytes. null: 1024, or all there are."""

    on_new_chars: Literal["error", "drop", "extend"] = "error"
    """Characters the model's vocabulary lacks: error, drop, or (to fine-tune) extend it by them."""


class Training(Settings):
    """Optimization: batch size, number of steps, optimizer, schedule, evaluation."""

    batch_size: Positive = 8
    """Sequences per optimizer step, over all devices."""

    micro_batch_size: Positive | None = None
    """Sequences per forward and backward pass; gradients are accumulated. null: the whole batch."""

    max_iters: Positive | None = 1250
    """Optimizer steps. null: determined by epochs or max_minutes."""

    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Train for this many epochs instead of max_iters."""

    max_minutes: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Train for about this many minutes. With max_iters or epochs set too: stop at this limit."""

    size: Literal["auto"] | None = None
    """auto: choose n_layer, n_embd and n_head for the lowest predicted loss after max_minutes."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the blocks' matrices, AdamW for the rest. adamw: AdamW for all."""

    learning_rate: Annotated[float, Field(gt=0, le=MAX_RATE)] = 8e-3
    """Peak learning rate of AdamW; Muon's is twice as large."""

    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] = "wsd"
    """Shape of the decay to min_lr after warmup. wsd: constant, then linear. constant: no decay."""

    warmup_iters: Count = 20
    """Steps of linear warmup to learning_rate."""

    min_lr: Annotated[float, Field(ge=0, le=MAX_RATE)] | None = 0.0
    """Learning rate at the end of the schedule. null: learning_rate / 10."""

    lr_decay_iters: Positive | None = None
    """Step at which the schedule reaches min_lr. null: max_iters."""

    lr_decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.85
    """wsd: the last fraction of the steps after warmup, in which the learning rate decays."""

    weight_decay: Annotated[float, Field(ge=0, le=1e6)] = 0.07
    """Decoupled weight decay of matrices and embeddings; none for biases and norms."""

    beta1: Fraction = 0.9
    """AdamW's decay rate of the first moment."""

    beta2: Fraction = 0.995
    """AdamW's decay rate of the second moment."""

    muon_momentum: Fraction = 0.92
    """Muon's momentum."""

    grad_clip: Annotated[float, Field(ge=0, le=MAX_RATE)] = 1.0
    """Maximum gradient norm; larger gradients are scaled down to it. 0: no clipping."""

    eval_interval: Count = 100
    """Steps between evaluations; the last step is always evaluated. 0: the last step only."""

    eval_iters: Annotated[int, Field(ge=0, le=1_000_000)] = 10
    """Fixed evaluation batches per split. 0: all of val, and as many windows of train."""

    early_stopping_patience: Count = 0
    """Stop after this many evaluations without a better val loss. 0: never."""

    seed: Seed = 1337
    """Seed of initialization, batches, dropout and samples; evaluation does not use it."""


class Saving(Settings):
    """Which checkpoints are saved, and which of them are kept."""

    checkpoint_interval: Count = 500
    """Steps between checkpoints, besides a new best, the last step and signals. 0: only these."""

    keep_checkpoints: Positive | None = 2
    """How many of the newest checkpoints to keep; the best is always kept. null: all."""

    keep_every: Count = 0
    """Also save at multiples of this many steps, and never remove those checkpoints. 0: none."""


class Runtime(Settings):
    """The machine: speed and rounding. Dropout masks may differ between device types."""

    device: Device = "auto"
    """auto (CUDA, else MPS, else CPU), cpu, mps, cuda or cuda:N."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How torchrun's processes share the model. ddp: replicated; fsdp: sharded."""

    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads per process. null: PyTorch's choice."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of matrix products. auto: bf16 if the hardware supports it natively, else fp32."""

    torch_compile: Switch = "auto"
    """Use torch.compile. auto: if it works and saves time within the run."""

    compile_backend: Literal["auto", "inductor", "aot_eager"] = "auto"
    """torch.compile's backend. auto: inductor, or aot_eager on MPS."""


class Tracking(Settings):
    """Output and logs of a run."""

    log_interval: Positive = 50
    """Steps between printed lines; metrics.jsonl has every step."""

    sample_interval: Count = 1
    """Sample before training, and at evaluations this many steps apart. 0: at the end only."""

    histogram_interval: Count = 250
    """Steps between histograms of weights and gradients. 0: none."""

    aim_logging: bool = False
    """Whether to log to Aim too (extra aim)."""


class Run(Settings):
    """Names and directories. Not part of a run's record: a rerun has its own."""

    run_tag: Annotated[str, BeforeValidator(_check_path)] | None = None
    """Suffix of the run directory's name, after the timestamp."""

    runs_dir: PathText = "runs"
    """Directory of the runs."""

    aim_repo: PathText | None = None
    """Aim's repository: a directory, or aim://host:port. null: .aim beside runs_dir."""

    model_name: ModelName | None = None
    """Train this named model in checkpoints_dir: resume it if it exists, else create it."""

    checkpoints_dir: PathText = "checkpoints"
    """Directory of the named models."""

    cache_dir: PathText | None = None
    """Directory that caches token stores and standard input. null: the user's cache directory."""


class Initialization(Settings):
    """The source of a new model's weights. To resume, use --resume."""

    init_from: PathText | None = None
    """Fine-tune: start from the weights and tokenizer of this named model, run or bundle."""


GROUPS: dict[str, type[Settings]] = {
    group.__name__.lower(): group
    for group in (Architecture, Data, Training, Saving, Runtime, Tracking, Initialization, Run)
}
ALIASES = {"input_file": "data"}
# Architecture-specific defaults of settings that are null.
ARCHITECTURE_DEFAULTS: dict[str, dict[str, Any]] = {
    "modern": {"tie_weights": False, "activation": "silu"},
    "gpt2": {"tie_weights": True, "activation": "gelu"},
    "speedrun": {"tie_weights": False, "activation": "silu", "ngram_rows": 16384},
}
SHAPE_SETTINGS = ("n_layer", "n_embd", "n_head")  # that size auto chooses
BY_ARCHITECTURE = frozenset(name for own in ARCHITECTURE_DEFAULTS.values() for name in own)


class ModelConfig(Run, Initialization, Tracking, Runtime, Saving, Training, Data, Architecture):
    """Every setting of a run, validated. pydantic takes fields from the last base to the first."""

    @model_validator(mode="after")
    def _complete(self, info: ValidationInfo) -> "ModelConfig":
        """Set the defaults that depend on other settings, and check all settings together."""
        # A single source is checked alone; conflicts with other sources are found after merging.
        if info.context and info.context.get("single_source"):
            return self
        own = ARCHITECTURE_DEFAULTS[self.architecture].items()
        defaults = {name: value for name, value in own if getattr(self, name) is None}
        is_limited = self.epochs is not None or self.max_minutes is not None
        if is_limited and "max_iters" not in self.model_fields_set:
            defaults["max_iters"] = None
        # Bypass `frozen`, and keep these out of `model_fields_set`.
        self.__dict__.update(defaults)
        if problems := [problem for _, problem in find_conflicts(self.model_dump())]:
            raise ValueError("; ".join(problems))
        return self

    @property
    def tokens_per_step(self) -> int:
        """The number of tokens in the batch of one optimizer step."""
        return self.batch_size * self.block_size


def find_conflicts(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (names, problem) for each invalid combination of settings that are valid one by one.

    Settings that the architecture determines may be missing from `values`.
    """
    architecture, n_embd, n_head = (values[n] for n in ("architecture", "n_embd", "n_head"))
    if n_embd % n_head:
        yield ("n_embd", "n_head"), f"n_embd {n_embd} is not divisible by n_head {n_head}"
    if architecture != "gpt2" and values["bias"]:
        yield (
            ("architecture", "bias"),
            f"architecture {architecture} has no biases: set bias to false, or architecture to "
            "gpt2",
        )
    if architecture != "gpt2" and n_embd / n_head % 2 == 1:
        yield (
            ("architecture", "n_embd", "n_head"),
            f"architecture {architecture} needs an even head size, but n_embd {n_embd} / n_head "
            f"{n_head} is odd",
        )
    if architecture != "speedrun" and values.get("ngram_rows") is not None:
        yield (
            ("architecture", "ngram_rows"),
            f"ngram_rows {values['ngram_rows']} is a setting of architecture speedrun only: set it "
            f"to null, as {architecture} has no n-gram embeddings",
        )
    if values["train_split"] + values["test_split"] >= 1:
        yield (
            ("train_split", "test_split"),
            f"train_split {values['train_split']:g} and test_split {values['test_split']:g} "
            "leave nothing for validation: their sum must be below 1",
        )
    if values["vocab_size"] is not None and values["tokenizer"] != "bpe":
        yield (
            ("vocab_size", "tokenizer"),
            f"vocab_size {values['vocab_size']} is a setting of tokenizer bpe only: that of "
            f"{values['tokenizer']} cannot be chosen",
        )
    if values["min_lr"] is not None and values["min_lr"] > values["learning_rate"]:
        yield (
            ("min_lr", "learning_rate"),
            f"min_lr {values['min_lr']:g} is above learning_rate {values['learning_rate']:g}",
        )
    if values["max_iters"] is not None and values["epochs"] is not None:
        yield (
            ("max_iters", "epochs"),
            "max_iters and epochs both set the length of the run: set one of them to null",
        )
    if values["size"] == "auto" and (
        values["max_minutes"] is None or values["max_iters"] or values["epochs"]
    ):
        yield (
            ("size", "max_minutes", "max_iters"),
            "size auto needs the time of the run: set max_minutes, without max_iters or epochs",
        )
    if values["early_stopping_patience"] and not values["eval_interval"]:
        yield (
            ("early_stopping_patience", "eval_interval"),
            "early_stopping_patience needs evaluations during training: set eval_interval above 0",
        )
    if all(values[name] is None for name in ("max_iters", "epochs", "max_minutes")):
        yield (
            ("max_iters",),
            "the length of the run is not set: set max_iters, epochs or max_minutes",
        )


def build_json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file, for editors."""
    schema = ModelConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Folio configuration"
    schema["description"] = "A configuration file of Folio: flat, every key optional."
    schema["properties"]["$schema"] = {"type": "string"}
    for alias, name in ALIASES.items():
        schema["properties"][alias] = schema["properties"][name]
    return schema


if __name__ == "__main__":
    import json

    print(json.dumps(build_json_schema(), indent=2, ensure_ascii=False))
