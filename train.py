"""Train a character-level GPT from one text file, and keep the whole record of the run.

    python train.py --run-tag baseline
    python train.py --resume last
    python train.py --model-name dante --data dante.txt --max-iters 5000 --n-layer 6
    python train.py --model-name purgatorio --init-from dante --data purgatorio.txt

The training loop is in trainer.py. From Python: `trainer.train(ModelConfig(data="dante.txt"))`.
"""

import sys
from collections.abc import Sequence

from callbacks import load_callback_factories
from config import ConfigLoader, format_settings
from parameters import ALIASES, GROUPS, ModelConfig
from resume import plan_run
from utils.command_line import Action, CommandLine
from utils.garbage import pause_garbage_collection
from utils.output import Output, run_command
from utils.ranks import Ranks

ACTIONS = (
    Action(
        "config", "Read settings from a YAML or JSON file, or a run's full_config.json.", "FILE"
    ),
    Action(
        "resume",
        "Resume a run (its id or directory), a bundle or a named model; the newest run (last); or "
        "the newest checkpoint if there is one (auto).",
        "RUN|BUNDLE|last|auto",
    ),
    Action("reset_optimizer", "Resume with a new optimizer."),
    Action(
        "callback",
        "Call an object of your own after steps and evaluations and at the end, created by "
        "make(config) in your module; may be repeated. See docs/callbacks.md.",
        "MODULE:MAKE",
        repeats=True,
    ),
    Action("overwrite", "Replace the named model if it exists."),
    Action("show_config", "Print every setting with its source, and exit."),
    Action(
        "dry_run",
        "Print the size, memory and time of the run, measured with a few steps, and a model size "
        "that is predicted to be better, and exit; with --show-config, every setting too.",
    ),
)


def main(argv: Sequence[str]) -> int:
    """Settle the settings, then train, or print what training would be."""
    command_line = CommandLine(__doc__, ModelConfig, ACTIONS, GROUPS, ALIASES)
    flags, actions, problems = command_line.parse(argv)
    loaded, plan = plan_run(
        ConfigLoader(flags, actions.get("config"), problems),
        resume=actions.get("resume"),
        overwrite="overwrite" in actions,
        reset_optimizer="reset_optimizer" in actions,
    )
    output = Output(quiet=Ranks.from_environment().rank > 0)
    for note in loaded.notes:
        output.print(note)
    is_dry_run, show_config = "dry_run" in actions, "show_config" in actions
    if show_config and not is_dry_run:
        output.print(format_settings(loaded))
        return output.exit_status
    callbacks = load_callback_factories(actions.get("callback", []))

    with pause_garbage_collection():  # late: torch takes a second, and the settings are valid
        from trainer import dry_run, train

    if is_dry_run:
        output.print(dry_run(loaded, plan, output.print, show_config=show_config))
        return output.exit_status
    result = train(
        loaded.config, loaded=loaded, plan=plan, argv=argv, output=output, callbacks=callbacks
    )
    return result.exit_status


if __name__ == "__main__":
    sys.exit(run_command(main))
