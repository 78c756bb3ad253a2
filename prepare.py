"""Before the first step: what a run needs, what it says, and the record of how it began.

`set_up` makes the device, the text, the model and the optimizer that the settings ask for;
`open_run` makes the run directory and tells what begins.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from bundle import WEIGHTS_FILE, Bundle, TrainingState, copy_bundle, is_bundle, read_state
from callbacks import Best, CallbackFactory, describe_callbacks
from checkpoint import load_tokenizer, load_weights, restore_training_state
from config import CHECKOUT, LoadedConfig, upgrade_settings
from corpus import SPLITS
from data import (
    Dataset,
    count_windows,
    format_char_counts,
    get_batch,
    load_dataset,
    split_micro_batches,
)
from distributed import (
    SINGLE_PROCESS,
    World,
    check_same_settings,
    derive_seed,
    shard_model,
    wrap_ddp,
)
from model import LanguageModel
from optim import create_optimizer, learning_rate_at
from parameters import ModelConfig
from start import (
    ResumePlan,
    check_not_stopped_early,
    check_rerun,
    check_steps_left,
    find_kept_checkpoint,
    plan_from_config,
    read_start_bundle,
)
from step import Setup, estimate_loss, training_step
from utils.data_files import resolve_data_path
from utils.device import (
    DTYPES,
    CompileResult,
    autocast,
    choose_backend,
    choose_device,
    choose_precision,
    compile_model,
    describe_device,
    get_peak_memory,
    get_processor_name,
    set_tf32,
    synchronize,
)
from utils.errors import UserError
from utils.output import Output, pluralize
from utils.ranks import Ranks
from utils.run_manager import MetadataCapture, RunDirectory, RunDirectoryCreator, RunIDGenerator
from utils.tracking.aim import require_aim

# A run with a shorter limit is not compiled unless asked for.
MINUTES_WORTH_COMPILING = 4.0


def set_up(
    config: ModelConfig,
    loaded: LoadedConfig | None = None,
    start: ResumePlan | None = None,
    callbacks: Mapping[str, CallbackFactory] | None = None,
    *,
    world: World = SINGLE_PROCESS,
    cache: bool = True,
    tell: Callable[[str], None] | None = None,
) -> Setup:
    """Make what a run needs before its first step: device, text, model and optimizer.

    The callbacks are kept, to be made when it begins; `tell` hears of what takes a while. Of
    several processes, all call this.

    Raises `UserError` for a device, a text or a bundle that cannot be used, and `NothingToDo`.
    """
    start = start or plan_from_config(config)
    check_same_settings(world, (config, start.bundle and start.bundle.state))
    check_steps_left(config, start)
    if config.aim_logging:
        require_aim(config)
    device = open_device(config)
    sources = dict(loaded.sources) if loaded else sources_in_code(config)
    bundle = read_start_bundle(start)
    data = world.run_on_all_ranks(
        lambda: load_dataset(
            config,
            tokenizer=load_tokenizer(bundle) if bundle else None,
            may_extend=not start.is_resume,
            # A model that began with the sample corpus goes on with it, whatever else is there now.
            sample=start.is_resume and sources["data"] == str(start.bundle.path),
            cache=cache,
            on_progress=tell,
        )
    )
    if loaded is not None:
        check_rerun(loaded, start, data.name, data.sha256)
    precision = choose_precision(config.precision, device)
    if start.is_resume and measures_alike(config, data, precision, start.bundle.state):
        check_not_stopped_early(config, start)
    settled, length = settle_length(config, data, device, start, world)
    if length != "max_iters":
        sources["max_iters"] = f"{length} {getattr(config, length):g} ({sources[length]})"
        check_steps_left(settled, start)
    setup = create_setup(settled, sources, data, device, start, bundle, tell, world)
    return replace(setup, callbacks=callbacks or {})


def open_device(config: ModelConfig) -> torch.device:
    """The device, with the CPU threads and TF32 that the settings say. Raises `UserError`."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = choose_device(config.device, Ranks.from_environment())
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # what PyTorch puts there by itself goes there too
    set_tf32(device, config.precision)
    return device


def sources_in_code(config: ModelConfig) -> dict[str, str]:
    """Where the settings of a config made in Python came from."""
    given = config.model_fields_set
    return {name: "train()" if name in given else "default" for name in ModelConfig.model_fields}


def create_setup(
    config: ModelConfig,
    sources: dict[str, str],
    data: Dataset,
    device: torch.device,
    start: ResumePlan,
    bundle: Bundle | None = None,
    tell: Callable[[str], None] | None = None,
    world: World = SINGLE_PROCESS,
) -> Setup:
    """A model and its optimizer as `start` says; new weights are those of the seed, anywhere.

    `bundle` is that of `start`, with its contents, which are needed for no longer than this.
    `tell` hears of what takes a while. Of several processes, all call this.
    """
    torch.manual_seed(config.seed)
    tokenizer = data.tokenizer
    model = LanguageModel(config, tokenizer.vocab_size, tokenizer.num_tokens)
    if bundle is not None:
        load_weights(bundle, model)
    if world.size > 1 and config.parallel == "fsdp":
        shard_model(model, device)
    model.to(device)
    if world.rank > 0:  # each process drops out other activations
        torch.manual_seed(derive_seed(config.seed, world.rank, start.step))
    precision = choose_precision(config.precision, device)
    optimizer = create_optimizer(model, config, DTYPES[precision])
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    learner, compiled = create_learner(model, data, config, device, tell, world)
    if bundle is not None and start.is_resume and not start.reset_optimizer:
        restore_training_state(
            bundle, model, optimizer, scaler, world
        )  # dropout's generator among it
    return Setup(
        config=config,
        sources=sources,
        start=start,
        device=device,
        data=data,
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        precision=precision,
        learner=learner,
        compiled=compiled,
        world=world,
    )


def create_learner(
    model: LanguageModel,
    data: Dataset,
    config: ModelConfig,
    device: torch.device,
    tell: Callable[[str], None] | None = None,
    world: World = SINGLE_PROCESS,
) -> tuple[Callable, CompileResult]:
    """What a step calls: the model, compiled where the settings say so and where that works.

    Of several processes each compiles its own, and what a step calls shares their gradients.

    Raises `UserError` where it does not work and was asked for.
    """
    if world.size > 1 and config.parallel == "fsdp":
        return model, CompileResult("off", "parallel is fsdp")
    tokens = (config.max_iters or 1) * config.batch_size * config.block_size
    operations = 6.0 * model.count_parameters() * tokens  # forward and backward, about
    if config.max_minutes is not None and config.max_minutes < MINUTES_WORTH_COMPILING:
        operations = 0.0
    wanted = choose_backend(config.torch_compile, config.compile_backend, device, operations)
    if wanted.mode != "off" and tell:
        tell(f"Compiling the model ({wanted.mode}), which takes up to a minute …")

    def probe(learner: Callable) -> None:
        """Go forward and back once with each shape of a step."""
        sizes = {"batch_size": config.batch_size, "block_size": config.block_size}
        mine = split_micro_batches(config, world.get_rows(config.batch_size))
        shapes = {rows.stop - rows.start: rows for rows in mine}
        for rows in shapes.values():
            batch = get_batch(data.splits["train"], 0, seed=config.seed, **sizes, rows=rows)
            inputs, targets = (part.to(device) for part in batch)
            with autocast(device, choose_precision(config.precision, device)):
                _, loss = learner(inputs, targets)
            loss.backward()
        model.zero_grad()

    learner, compiled = compile_model(model, wanted, config.torch_compile, probe)
    return wrap_ddp(learner, device, world), compiled


def bring_best(setup: Setup, run: RunDirectory, output: Output) -> Best:
    """The best so far of a training that goes on; its model becomes this run's export.

    Where that model is not at hand, or was measured in another way, the best counts anew.
    """
    start = setup.start
    if not start.is_resume or start.bundle.state.best_val_loss is None:
        return Best()
    state, config = start.bundle.state, setup.config
    since = state.get_fact("evaluations_since_best") or 0
    best = Best(state.get_fact("best_step"), state.best_val_loss, since)
    is_comparable = measures_alike(config, setup.data, setup.precision, state)
    earlier = start.continued_run or Path(config.runs_dir) / str(state.run_id)
    for place in (
        RunDirectory(earlier).export,
        RunDirectory(earlier).get_checkpoint(best.step or 0),
    ):
        if is_comparable and is_bundle(place):
            with contextlib.suppress(UserError):  # damaged, or removed by its own run meanwhile
                if read_state(place).step == best.step:
                    copy_bundle(place, run.export, with_optimizer=False)
                    return best
    why = "is not at hand" if is_comparable else "was measured in another way"
    output.print(f"Note: the best model so far (step {best.step}) {why}: the best counts anew\n")
    return Best()


def measures_alike(
    config: ModelConfig, data: Dataset, precision: str, state: TrainingState
) -> bool:
    """Whether the val losses of a run of `config` compare with those of `state`."""
    measure = ("eval_iters", "train_split", "test_split", "split_by", "on_new_chars")
    recorded = upgrade_settings(state.settings)
    return (
        data.sha256 == state.get_fact("data_sha256")
        and precision == (state.get_fact("computed_in") or "fp32")
        and all(recorded.get(name) == getattr(config, name) for name in measure)
    )


def settle_length(
    config: ModelConfig,
    data: Dataset,
    device: torch.device,
    start: ResumePlan,
    world: World = SINGLE_PROCESS,
) -> tuple[ModelConfig, str]:
    """Turn `epochs` or `max_minutes` into `max_iters`, and name the setting that decided.

    A config with a number of steps alone trains the same model on any machine.
    """
    if config.max_iters is not None:
        return config, "max_iters"
    if config.epochs is not None:
        tokens_per_step = config.batch_size * config.block_size
        max_iters = math.ceil(config.epochs * data.splits["train"].size / tokens_per_step)
        settled = {"max_iters": max_iters, "epochs": None}
        return config.model_copy(update=settled), "epochs"
    assert config.max_minutes is not None
    speed = measure_speed(config.model_copy(update={"max_iters": 1}), data, device, world)
    seconds = world.broadcast_from_main(lambda: speed.seconds_per_step_with_evaluation)
    more = max(1, int(config.max_minutes * 60 / seconds))
    settled = {"max_iters": start.step + more, "max_minutes": None}
    return config.model_copy(update=settled), "max_minutes"


@dataclass(frozen=True)
class Speed:
    """Seconds for one step and for one whole evaluation, and the most bytes held so far."""

    step: float
    evaluation: float
    steps_between_evaluations: float
    get_peak_memory: int | None

    @property
    def seconds_per_step_with_evaluation(self) -> float:
        """What a long run takes for each of its steps."""
        return self.step + self.evaluation / self.steps_between_evaluations


def measure_speed(
    config: ModelConfig, data: Dataset, device: torch.device, world: World = SINGLE_PROCESS
) -> Speed:
    """Time real steps, and a part of an evaluation, of a model that is thrown away."""
    setup = create_setup(config, {}, data, device, ResumePlan(), world=world)
    seconds: list[float] = []
    began = time.perf_counter()

    def has_time() -> bool:
        return len(seconds) < 3 or (len(seconds) < 20 and time.perf_counter() - began < 5)

    while world.broadcast_from_main(has_time):
        start = time.perf_counter()
        training_step(setup, len(seconds))
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    step = sorted(seconds[1:])[len(seconds[1:]) // 2]  # the first one warms up
    evaluation = time_evaluation(setup)
    return Speed(step, evaluation, config.eval_interval or math.inf, get_peak_memory(device))


def time_evaluation(setup: Setup) -> float:
    """The seconds of a whole evaluation, by one batch of each split."""
    config, splits = setup.config, setup.data.splits
    one = config.model_copy(update={"eval_iters": 1})
    estimate_loss(setup.model, setup.data, one, setup.precision, setup.world)  # warms up
    start = time.perf_counter()
    estimate_loss(setup.model, setup.data, one, setup.precision, setup.world)
    part = time.perf_counter() - start
    windows = count_windows(splits["val"], config)
    return part * (config.eval_iters or windows / config.batch_size)


# ----------------------------------------------------------------------------------------------
# The record, and what is said


def open_run(
    setup: Setup,
    loaded: LoadedConfig | None,
    argv: Sequence[str],
    output: Output,
) -> RunDirectory:
    """Make the run directory, start its `console.txt`, write its `meta/`, and say what begins."""
    config, data = setup.config, setup.data
    run_id = RunIDGenerator.generate(setup.start.run_tag)
    run = RunDirectoryCreator(Path(config.runs_dir)).create(run_id)
    output.record_to(run.console)
    output.print(banner(setup, loaded))
    output.print(f"Run    {run.path}\n")
    if warning := other_text(setup):
        output.print_warning(warning)
    if note := callbacks_missing(setup, loaded):
        output.print(note)
    if note := computed_otherwise(setup):
        output.print(note)
    if setup.compiled.fell_back:
        output.print(f"Note: trained without torch.compile: {setup.compiled.reason}\n")
    if config.warmup_iters > config.max_iters:
        reached = learning_rate_at(config.max_iters - 1, config)
        output.print(
            f"Note: the run ends within its warm-up of {config.warmup_iters} steps, at a learning "
            f"rate of {reached:g}; lower warmup_iters to learn faster\n"
        )
    parent = setup.start.bundle if not setup.start.is_resume else None
    init_from = str(parent.path.resolve()) if parent is not None else None
    recorded = config.model_copy(update={"data": recorded_path(data), "init_from": init_from})
    record = run_record(setup, run.run_id, argv)
    capture = MetadataCapture(run.meta, CHECKOUT)
    capture.capture(recorded, setup.sources, record, machine_record(setup.device))
    return run


def run_record(setup: Setup, run_id: str, argv: Sequence[str]) -> dict[str, Any]:
    """What full_config.json says of a run beside its settings."""
    data, start = setup.data, setup.start
    resumed_from = None
    if start.is_resume:
        resumed_from = {
            "run_id": start.bundle.state.run_id,
            "step": start.step,
            "weights_sha256": start.bundle.state.files[WEIGHTS_FILE],
            "path": str(find_kept_checkpoint(start, Path(setup.config.runs_dir)).resolve()),
        }
    return {
        "run_id": run_id,
        "argv": list(argv),
        "callbacks": describe_callbacks(setup.callbacks),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "resumed_from": resumed_from,
        "model_name": start.named_model.name if start.named_model else None,
        "lineage": [ancestor.model_dump() for ancestor in start.lineage],
        "data": {
            "name": data.name,
            "sha256": data.sha256,
            "tokens": data.num_tokens,
            "vocab_size": data.tokenizer.vocab_size,
        },
        "parameters": setup.model.count_parameters(),
        "device": str(setup.device),
        "processes": setup.world.size,
        "threads": torch.get_num_threads(),
        "precision": setup.precision,
        "torch_compile": setup.compiled.mode,
        "torch_compile_reason": setup.compiled.reason,
    }


def recorded_path(data: Dataset) -> str | None:
    """The text's whole path, so that a record serves from any directory."""
    return data.path and resolve_data_path(data.path)


def banner(setup: Setup, loaded: LoadedConfig | None = None) -> str:
    """What is trained, on what, with what."""
    config, data, start = setup.config, setup.data, setup.start
    sizes = ", ".join(f"{data.splits[s].size:,} {s}" for s in SPLITS if s in data.splits)
    mode = setup.compiled.mode
    how = f"{setup.precision}{'' if mode == 'off' else f', torch.compile {mode}'}"
    if setup.world.size > 1:
        how += f", {setup.world.size} processes ({config.parallel})"
    unit = data.tokenizer.unit
    lines = [
        f"Model  {setup.model.count_parameters():,} parameters: {pluralize(config.n_layer, 'layer')}, "
        f"{pluralize(config.n_head, 'head')}, {config.n_embd} channels, context {config.block_size}",
        f"Text   {data.name}: {data.num_tokens:,} {unit}s ({sizes}), "
        f"{data.tokenizer.num_tokens:,} different",
    ]
    if data.left_out:
        lines.append(f"       left out: {format_char_counts(data.left_out)}")
    if start.is_resume:
        lines.append(
            f"Resume {start.bundle.path}, step {start.step:,}"
            + (" with a new optimizer" if start.reset_optimizer else "")
        )
        lines += [f"       {change}" for change in (loaded.changes if loaded else [])]
    elif start.bundle is not None:
        lines.append(f"Parent {start.bundle.path}, step {start.bundle.state.step:,}")
        added = data.tokenizer.num_tokens - start.bundle.vocab_size
        if data.tokenizer.token_kind == "char" and added:
            lines.append(f"       {pluralize(added, 'character')} added to its vocabulary")
    if start.named_model is not None:
        lines.append(f"Name   {start.named_model}")
    since = f"{start.step:,} to " if start.step else ""
    lines += [
        f"Steps  {since}{config.max_iters:,} of {config.batch_size} x {config.block_size} {unit}s: "
        f"{passes(config, data, start.step):.2g} passes over the text",
        f"Device {describe_device(setup.device)}, {how}",
    ]
    return "\n".join(lines)


def other_text(setup: Setup) -> str | None:
    """A warning, where a model goes on with another text than the one it was trained on."""
    start, data = setup.start, setup.data
    known = start.bundle.state.get_fact("data_sha256") if start.is_resume else None
    if known is None or known == data.sha256:
        return None
    before = start.bundle.state.settings.get("data") or "the sample corpus"
    return (
        f"ANOTHER TEXT: {data.name} (SHA-256 {data.sha256[:12]}…) is not what this model was "
        f"trained on until now ({before}, SHA-256 {known[:12]}…)"
    )


def computed_otherwise(setup: Setup) -> str | None:
    """A note, where a model goes on in another precision, compiled in another way, and so on."""
    if not setup.start.is_resume:
        return None
    state = setup.start.bundle.state
    if state.get_fact("compiled_by") is None:  # an older model does not say how
        return None

    def described(precision: str, mode: str, size: int) -> list[str]:
        return [
            f"in {precision}",
            f"with torch.compile {mode}",
            f"by {pluralize(size, 'process', 'processes')}",
        ]

    known = (state.get_fact("computed_in") or "fp32", state.get_fact("compiled_by"))
    before = described(*known, state.get_fact("processes") or 1)
    now = described(setup.precision, setup.compiled.mode, setup.world.size)
    pairs = [pair for pair in zip(before, now, strict=True) if pair[0] != pair[1]]
    if not pairs:
        return None
    was, becomes = (", ".join(words) for words in zip(*pairs, strict=True))
    return (
        f"Note: computed {was} until now, and {becomes} from here on: as good, and not the same "
        "to the bit\n"
    )


def callbacks_missing(setup: Setup, loaded: LoadedConfig | None) -> str | None:
    """A note, where a run is made again without the callbacks that it had."""
    had = ((loaded and loaded.rerun_of) or {}).get("callbacks") or []
    names = [callback["name"] for callback in had if callback.get("name")]
    missing = [name for name in names if name not in setup.callbacks]
    if not missing:
        return None
    return f"Note: the run that is made again here had {', '.join(missing)}: add it for the same\n"


def passes(config: ModelConfig, data: Dataset, first_step: int = 0) -> float:
    """How often a run sees each token of the train split, on average."""
    steps = config.max_iters - first_step
    return steps * config.batch_size * config.block_size / data.splits["train"].size


def machine_record(device: torch.device) -> dict[str, str]:
    """What torch knows of the machine, for env.txt."""
    return {
        "device": describe_device(device),
        "processor": get_processor_name(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "torch build": "\n  " + torch.__config__.show().strip().replace("\n", "\n  "),
    }
