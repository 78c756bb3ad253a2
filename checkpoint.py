"""Save a training state as a bundle, and restore it bit for bit."""

import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from bundle import (
    FORMAT_VERSION,
    OPTIMIZER_FILE,
    RESET_REMEDY,
    WEIGHTS_FILE,
    Bundle,
    TrainingState,
    clean_up,
    copy_bundle,
    create_weights_error,
    is_bundle,
    list_checkpoints,
    parse_step,
    remove_bundle,
    write_bundle,
)
from distributed import SINGLE_PROCESS, World, gather_to_main, shard_like
from model import LanguageModel
from parameters import ModelConfig
from tokenizer import Tokenizer
from utils.errors import RunError, UserError, format_reason
from utils.files import glob_files, is_own_directory
from utils.pickles import check_archive
from utils.run_manager import RunDirectory

# Saving -----------------------------------------------------------------------------------------


@dataclass
class CheckpointWriter:
    """Writes the bundles of one run: its checkpoints, its export and its named model, if any.

    All ranks call its methods: rank 0 gathers the shards and writes. They raise:
        RunError: the weights are not finite; they must not replace good ones.
        UserError: the new checkpoint was damaged before it was copied.
        OSError: the disk is full or failing. What was saved before is unchanged.
    """

    run: RunDirectory
    named_model: Path | None
    model: LanguageModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    tokenizer: Tokenizer
    config: ModelConfig
    world: World = SINGLE_PROCESS
    newest: Path | None = field(default=None, init=False)

    def create_named_model(self, state: TrainingState) -> None:
        """Publish the named model before its first step, unless it exists already.

        An existing one stays until trained weights replace it.
        """
        path = self.named_model
        if path and not self.world.broadcast_from_main(is_bundle, path):
            self.write(path, state)

    def save(self, state: TrainingState) -> None:
        """Save a checkpoint; copy it to the export if it is the best, and to the named model."""
        if self.newest is None:  # at the first save, so that a run that only loads writes nothing
            self.world.broadcast_from_main(self._clean_up_runs)
        checkpoint = self.run.get_checkpoint(state.step)
        self.write(checkpoint, state)
        self.newest = checkpoint
        self.world.broadcast_from_main(self._copy_newest, state)

    def write(self, directory: Path, state: TrainingState) -> None:
        """Publish the current training state as the bundle `directory`."""
        model, weights = self.model, self.model.state_dict()
        weights = {name: gather_to_main(tensor, self.world) for name, tensor in weights.items()}
        optimizer_state = _gather_optimizer_state(model, self.optimizer, self.scaler, self.world)
        metadata = {"step": str(state.step), "run_id": str(state.run_id)}
        device = next(model.parameters()).device.type
        tokenizer = self.tokenizer.get_state()
        bundle = Bundle(directory, self.config, model.vocab_size, device, tokenizer, state)

        def publish() -> None:
            if not all(tensor.isfinite().all() for tensor in weights.values()):
                raise RunError(
                    f"weights are not finite after step {state.step}: lower learning_rate"
                )
            write_bundle(
                bundle,
                save_weights=lambda path: model.save_safetensors(path, metadata, weights),
                save_optimizer=lambda path: _write_optimizer(path, optimizer_state),
            )

        self.world.broadcast_from_main(publish)

    def _copy_newest(self, state: TrainingState) -> None:
        """Copy the newest checkpoint: to the export, if it is the best, and to the named model.

        Then remove the checkpoints that are not to be kept.
        """
        best_step = state.get_fact("best_step")
        if best_step == state.step:
            copy_bundle(self.newest, self.run.export, with_optimizer=False)
        if self.named_model:
            copy_bundle(self.newest, self.named_model)
        checkpoints = list_checkpoints(self.run.path)
        keep, every = self.config.keep_checkpoints, self.config.keep_every
        for path in checkpoints[:-keep] if keep else ():
            step = parse_step(path)
            if step != best_step and not (every and step % every == 0):
                remove_bundle(path)

    def _clean_up_runs(self) -> None:
        """Clean up after killed processes in all runs of `runs_dir`, as some never resume."""
        for path in glob_files(self.run.path.parent, "*"):
            run = RunDirectory(path)
            if not all(map(is_own_directory, (path, run.export.parent, run.checkpoints))):
                continue  # another user's, or not made by Folio
            for directory in (*glob_files(run.checkpoints, "step_*"), run.export):
                clean_up(directory)


def _write_optimizer(path: Path, state: dict[str, Any]) -> None:
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        # If the disk is full, torch.save raises an error about its file position while it handles
        # the OSError.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _gather_optimizer_state(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    world: World,
) -> dict[str, Any]:
    """Return the content of `optimizer.pt`, as tensors and plain Python values.

    `state` is keyed by parameter name. `generators` are the generator states of rank 0, and
    `other_generators` those of the ranks after it.
    """
    names = _list_parameter_names(model, optimizer)
    state = {
        names[index]: {
            key: gather_to_main(value, world) if isinstance(value, Tensor) else value
            for key, value in values.items()
        }
        for index, values in optimizer.state_dict()["state"].items()
    }
    generators = world.all_gather(_get_generator_states(next(model.parameters()).device))
    return {
        "format_version": FORMAT_VERSION,
        "optimizer": type(optimizer).__name__,
        "state": state,
        "scaler": scaler.state_dict(),  # empty unless the precision is fp16
        "generators": generators[0],
        "other_generators": generators[1:],
    }


def _list_parameter_names(model: LanguageModel, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the parameters' names in the order of the optimizer's indices."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _get_generator_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of the global generators, for initialization and dropout.

    Batches are functions of (seed, step), and samples have a generator of their own.
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


# Loading ----------------------------------------------------------------------------------------


def load_weights(bundle: Bundle, model: LanguageModel) -> None:
    """Load the bundle's weights into `model`, in place.

    Raises `UserError` if they do not fit, and `RunError` if they are not finite. A model with a
    larger vocabulary keeps its own rows for the ids that the bundle lacks.
    """
    path = bundle.path / WEIGHTS_FILE
    try:
        model.load_safetensors(bundle.contents[WEIGHTS_FILE])
    except (SafetensorError, RuntimeError) as error:
        raise create_weights_error(path, error) from None
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise create_weights_error(path)


def restore_training_state(
    bundle: Bundle,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    world: World = SINGLE_PROCESS,
) -> None:
    """Restore the state of the optimizer, the scaler and the random generators.

    Learning rate, betas and weight decay stay those of `optimizer`, as the configuration sets
    them. Call this last: later random draws would advance the generators. A rank that did not
    exist when this was saved keeps its generators.

    Raises `UserError` that names `--reset-optimizer` if the state cannot be used.
    """
    try:
        saved = _read_optimizer_state(bundle.contents[OPTIMIZER_FILE], type(optimizer).__name__)
        is_skipped = bool(saved.get("scaler"))  # fp16 may skip all steps so far
        has_stepped = bundle.state.step > (bundle.state.get_fact("start_step") or 0)
        if not saved["state"] and has_stepped and not is_skipped:
            raise ValueError("it has no state, and its model has been trained")
        optimizer.load_state_dict(_convert_to_indices(saved["state"], model, optimizer))
        if saved.get("scaler") and scaler.is_enabled():  # fp16 before and after
            if not all(math.isfinite(value) for value in saved["scaler"].values()):
                raise ValueError("its loss scale is not finite")
            scaler.load_state_dict(saved["scaler"])
        generators = [saved["generators"], *saved.get("other_generators", [])]
        if world.rank < len(generators):
            _restore_generators(generators[world.rank], next(model.parameters()).device)
    except Exception as error:  # a foreign file may raise anything
        reason = f"cannot be restored: {type(error).__name__}: {format_reason(error)}"
        raise UserError(f"{bundle.path / OPTIMIZER_FILE}: {reason}{RESET_REMEDY}") from None


def _read_optimizer_state(content: bytes, kind: str) -> dict[str, Any]:
    """Parse `optimizer.pt`. Raises ValueError if another program or optimizer wrote it."""
    check_archive(io.BytesIO(content), len(content))
    with warnings.catch_warnings(action="ignore"):  # torch's, about files it did not write
        # Tensors and plain values only: a pickle could run any code (see torch.load's manual).
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    found = (saved["format_version"], saved["optimizer"])
    if found != (FORMAT_VERSION, kind):
        raise ValueError(
            f"its format_version is {found[0]!r} and its optimizer {found[1]}, not "
            f"{FORMAT_VERSION} and {kind}"
        )
    return saved


def _convert_to_indices(
    state: dict[str, Any], model: LanguageModel, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Turn a state keyed by parameter name into the optimizer's `state_dict`, sharded like it.

    Raises ValueError if it is another model's.
    """
    groups = optimizer.state_dict()["param_groups"]
    if not state:  # saved before the first step
        return {"state": {}, "param_groups": groups}
    names = {parameter: name for name, parameter in model.named_parameters()}
    if state.keys() != set(names.values()):
        raise ValueError("its parameters are not those of this model")
    for group in optimizer.param_groups:
        keys = {"momentum"} if "momentum" in group else {"step", "exp_avg", "exp_avg_sq"}
        for parameter in group["params"]:
            saved = state[names[parameter]]
            if saved.keys() != keys:
                raise ValueError(f"the state of {names[parameter]} is of another optimizer")
            for key, value in saved.items():
                shape = torch.Size() if key == "step" else parameter.shape
                _check_tensor(f"{key} of {names[parameter]}", value, shape)
                if key != "step":
                    saved[key] = shard_like(value, parameter)
    by_index = enumerate(_list_parameter_names(model, optimizer))
    return {"state": {index: state[name] for index, name in by_index}, "param_groups": groups}


def _check_tensor(name: str, value: object, shape: torch.Size) -> None:
    """Raise ValueError unless `value` is a contiguous float32 tensor of `shape`.

    PyTorch's kernels do not check it: another layout or size corrupts the heap.
    """
    is_plain = type(value) is Tensor and value.layout == torch.strided
    if not is_plain or value.dtype != torch.float32 or value.shape != shape:
        raise ValueError(f"{name} is not a float32 tensor of shape {tuple(shape)}")
    if not value.is_contiguous() or value.untyped_storage().nbytes() < 4 * value.numel():
        raise ValueError(f"{name} is not contiguous")


def _restore_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    if "cpu" not in states:
        raise ValueError("it has no state of the random generators")
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
