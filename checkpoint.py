"""A live training state into a bundle, and back to the same bits."""

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from bundle import (
    FORMAT_VERSION,
    OPTIMIZER_FILE,
    WEIGHTS_FILE,
    Bundle,
    TrainingState,
    clean_up,
    copy_bundle,
    find_directory,
    find_usable_bundle,
    is_bundle,
    list_checkpoints,
    list_runs,
    parse_step,
    read_bundle,
    remove_bundle,
    write_bundle,
)
from distributed import SINGLE_PROCESS, World, gather_to_main, shard_like
from model import LanguageModel
from parameters import ModelConfig
from tokenizer import Tokenizer, restore_tokenizer
from utils.errors import RunError, UserError
from utils.files import glob_files
from utils.run_manager import RunDirectory

# ----------------------------------------------------------------------------------------------
# Saving


def save_checkpoint(
    directory: Path,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    tokenizer: Tokenizer,
    config: ModelConfig,
    state: TrainingState,
    world: World = SINGLE_PROCESS,
) -> None:
    """Publish the training as it is now in the bundle `directory`.

    Of several processes rank 0 writes; the others give their part of what it writes.

    Raises:
        RunError: the weights are not finite. A model that is beyond help replaces no good one.
        OSError: the disk is full, or refuses. What was saved before is untouched.
    """
    weights = {name: gather_to_main(tensor, world) for name, tensor in model.state_dict().items()}
    optimizer_state = _optimizer_state(model, optimizer, scaler, world)
    metadata = {"step": str(state.step), "run_id": str(state.run_id)}

    def publish() -> None:
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise RunError(
                f"the weights are not finite after step {state.step}: the run cannot go on; "
                "lower learning_rate"
            )
        write_bundle(
            directory,
            config=config,
            vocab_size=model.vocab_size,
            device=next(model.parameters()).device.type,
            tokenizer=tokenizer.get_state(),
            state=state,
            save_weights=lambda path: model.save_safetensors(path, metadata, weights),
            save_optimizer=lambda path: _write_optimizer(path, optimizer_state),
        )

    world.broadcast_from_main(publish)


class CheckpointWriter:
    """The bundles that one run writes: its checkpoints, its export, and its named model.

    Args:
        run: the run's directory.
        named_model: the directory of the named model that the run trains, if it trains one.
        model, optimizer, scaler, tokenizer: what is saved.
        config: its settings; `keep_checkpoints` and `keep_every` say what is kept.
    """

    def __init__(
        self,
        run: RunDirectory,
        named_model: Path | None,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        tokenizer: Tokenizer,
        config: ModelConfig,
        world: World = SINGLE_PROCESS,
    ):
        self.newest: Path | None = None
        self._run = run
        self._named_model = named_model
        self._saved = (model, optimizer, scaler, tokenizer, config)
        self._config = config
        self._world = world

    def create_named_model(self, state: TrainingState) -> None:
        """Publish the named model before its first step, unless there is one to be replaced.

        That one stays until there is something better than new weights in its place.
        """
        named_model = self._named_model
        if named_model is not None and self._world.broadcast_from_main(
            lambda: not is_bundle(named_model)
        ):
            save_checkpoint(named_model, *self._saved, state, self._world)

    def save(self, state: TrainingState) -> None:
        """Save a checkpoint; the export too where this step is the best; advance the named model.

        Raises what `save_checkpoint` raises.
        """
        if self.newest is None:  # here and not earlier: a run that only loads writes nothing
            self._world.broadcast_from_main(self._clean_up_after_others)
        directory = self._run.get_checkpoint(state.step)
        save_checkpoint(directory, *self._saved, state, self._world)
        self.newest = directory
        self._world.broadcast_from_main(self._follow, state)

    def _follow(self, state: TrainingState) -> None:
        """Bring what follows the newest checkpoint up to it: the export, the named model."""
        best_step = state.get_fact("best_step")
        if best_step == state.step:
            copy_bundle(self.newest, self._run.export, with_optimizer=False)
        if self._named_model is not None:
            copy_bundle(self.newest, self._named_model)
        self._remove_old(best_step)

    def _remove_old(self, best_step: int | None) -> None:
        """Remove the checkpoints of this run that need not be kept."""
        checkpoints = list_checkpoints(self._run.path)
        kept = set(checkpoints[-(self._config.keep_checkpoints or len(checkpoints)) :])
        for path in checkpoints:
            step = parse_step(path)
            every = self._config.keep_every
            if path not in kept and step != best_step and not (every and step % every == 0):
                remove_bundle(path)

    def _clean_up_after_others(self) -> None:
        """Finish or remove what killed processes have left in any run of `runs_dir`.

        A run that was killed in its first save is continued by none that could see to it.
        """
        for run in list_runs(self._run.path.parent):
            of_run = RunDirectory(run)
            for directory in (*glob_files(of_run.checkpoints, "step_*"), of_run.export):
                clean_up(directory)


def _write_optimizer(path: Path, state: dict[str, Any]) -> None:
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        # A full disk makes torch complain of its own positions; the system's reason is behind it.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _optimizer_state(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    world: World,
) -> dict[str, Any]:
    """What `optimizer.pt` holds: tensors and plain Python, keyed by the parameters' names.

    `generators` are those of rank 0, and `other_generators` those of the ranks after it.
    """
    saved = optimizer.state_dict()["state"]
    names = _parameter_names(model, optimizer)
    state = {
        names[index]: {
            key: gather_to_main(value, world) if isinstance(value, Tensor) else value
            for key, value in values.items()
        }
        for index, values in saved.items()
    }
    generators = world.gather(_generators(next(model.parameters()).device))
    return {
        "format_version": FORMAT_VERSION,
        "optimizer": type(optimizer).__name__,
        "state": state,
        "scaler": scaler.state_dict(),  # of fp16 alone; otherwise empty
        "generators": generators[0] if generators else {},
        "other_generators": generators[1:],
    }


def _parameter_names(model: LanguageModel, optimizer: torch.optim.Optimizer) -> list[str]:
    """The parameters' names in the order in which the optimizer counts them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer.param_groups
    return [names[id(parameter)] for group in groups for parameter in group["params"]]


def _generators(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that dropout draws from.

    Nothing else in a run draws from them: batches are functions of (seed, step), evaluations have
    fixed ones, and samples a generator of their own.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


# ----------------------------------------------------------------------------------------------
# Loading


def load_model(
    reference: str | Path,
    device: torch.device | str = "cpu",
    *,
    checkpoints_dir: str = "checkpoints",
    runs_dir: str = "runs",
) -> tuple[LanguageModel, Tokenizer]:
    """The model that `reference` names, in eval mode, and its tokenizer.

    `reference` is a named model's name, a run's id or directory (its best model), or a bundle.

    Raises `UserError` that names the file that is missing or does not fit.
    """
    directory = find_directory(str(reference), Path(runs_dir), Path(checkpoints_dir))
    bundle = read_bundle(find_usable_bundle(directory), WEIGHTS_FILE)
    return load_model_from_bundle(bundle, device)


def load_model_from_bundle(
    bundle: Bundle, device: torch.device | str = "cpu"
) -> tuple[LanguageModel, Tokenizer]:
    """The model whose weights were read with the bundle, in eval mode, and its tokenizer."""
    tokenizer = load_tokenizer(bundle)
    model = LanguageModel(bundle.config, bundle.vocab_size, tokenizer.num_tokens)
    load_weights(bundle, model)
    return model.to(device).eval(), tokenizer


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """The bundle's tokenizer. Raises `UserError` where it is not that of the bundle's model."""
    tokenizer = restore_tokenizer(bundle.tokenizer)
    if tokenizer.vocab_size != bundle.vocab_size:
        raise UserError(
            f"{bundle.path}: tokenizer.json has {tokenizer.vocab_size} tokens and config.json says "
            f"{bundle.vocab_size}: these files are not of one model"
        )
    return tokenizer


def load_weights(bundle: Bundle, model: LanguageModel) -> None:
    """Put the bundle's weights into `model`, in place.

    A model with a larger vocabulary keeps its own rows for the ids that the bundle's lacks.

    Raises `UserError` where the weights are not those of such a model.
    """
    path = bundle.path / WEIGHTS_FILE
    try:
        model.load_safetensors(bundle.contents[WEIGHTS_FILE])
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path}: not the weights of this model: {reason}") from None


def restore_training_state(
    bundle: Bundle,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    world: World = SINGLE_PROCESS,
) -> None:
    """Put back what was saved beside the weights: optimizer, scaler, random generators.

    Learning rate, betas and weight decay stay those of `optimizer`: the configuration has them.
    To be called last, as whatever draws a random number would move the generators on. A process
    whose rank had none when this was saved keeps the generators it has.

    Raises `UserError`, telling of `--reset-optimizer`, where the state cannot be used.
    """
    path = bundle.path / OPTIMIZER_FILE
    try:
        saved = _read_optimizer_state(bundle.contents[OPTIMIZER_FILE], type(optimizer).__name__)
        optimizer.load_state_dict(_fitted(saved["state"], model, optimizer))
        if saved.get("scaler") and scaler.is_enabled():  # in fp16 until now, and further on
            scaler.load_state_dict(saved["scaler"])
        generators = [saved["generators"], *saved.get("other_generators", [])]
        if world.rank < len(generators):
            _restore_generators(generators[world.rank], next(model.parameters()).device)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        remedy = "--reset-optimizer goes on with a new optimizer"
        raise UserError(f"{path}: {reason}; {remedy}") from None


def _read_optimizer_state(content: bytes, kind: str) -> dict[str, Any]:
    """What is in `optimizer.pt`. Raises ValueError where that is no state of such an optimizer."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a foreign file; the error says enough
            # Tensors and plain values alone: a pickle could run any code (see torch.load's manual).
            saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        missing = {"format_version", "optimizer", "state", "generators"} - saved.keys()
    except Exception as error:  # whatever a foreign file makes of a loader
        name = type(error).__name__
        raise ValueError(f"not the state of an optimizer ({name})") from None
    if missing:
        raise ValueError(f"not the state of an optimizer (no {', '.join(sorted(missing))})")
    if saved["format_version"] != FORMAT_VERSION:
        version = saved["format_version"]
        raise ValueError(f"format_version {version!r}, and this Folio reads {FORMAT_VERSION}")
    if saved["optimizer"] != kind:
        raise ValueError(f"the state of {saved['optimizer']}, and this run has {kind}")
    return saved


def _fitted(
    state: dict[str, Any], model: LanguageModel, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """A state that is keyed by the parameters' names as the optimizer's own, in its own order.

    Raises ValueError where it is another model's.
    """
    names = _parameter_names(model, optimizer)
    if state and state.keys() != set(names):  # before the first step there is none
        raise ValueError("does not fit: its parameters are not those of this model")
    for name, parameter in model.named_parameters():
        for value in state.get(name, {}).values():
            if _is_as_large(value) and value.shape != parameter.shape:
                raise ValueError(f"does not fit: {name} has another shape")
    parameters = dict(model.named_parameters())
    by_index = {
        index: {
            key: shard_like(value, parameters[name]) if _is_as_large(value) else value
            for key, value in state[name].items()
        }
        for index, name in enumerate(names)
        if name in state
    }
    return {"state": by_index, "param_groups": optimizer.state_dict()["param_groups"]}


def _is_as_large(value: Any) -> bool:
    """Whether something remembered of a parameter has a number for each of its own."""
    return isinstance(value, Tensor) and value.dim() > 0


def _restore_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    if "cpu" not in states:
        raise ValueError("does not fit: it has no state of the random generators")
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
