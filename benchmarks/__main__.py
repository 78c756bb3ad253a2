"""Measure the README's figures on this machine.

python -m benchmarks                  # all that need no data file
python -m benchmarks startup encoding

docs/benchmarks.md has those that are programs of their own, such as benchmarks.time_to_loss.
"""

import argparse
import importlib
from datetime import date

from benchmarks import get_commit
from utils.device import get_processor_name

BENCHMARKS = (
    "startup",
    "encoding",
    "corpus",
    "logging_cost",
    "saving",
    "generation",
    "processes",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--data", metavar="FILE", help="the text [the sample corpus]")
    parser.add_argument(
        "--llama2c", help="for generation: llama2.c's program `run`, measured in turns with Folio"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"no such benchmark: {', '.join(unknown)}")
    print(f"{get_processor_name()}, {date.today()}, commit {get_commit()}")
    for name in arguments.names or BENCHMARKS:
        print(f"\n{name}")
        others = [arguments.llama2c] if name == "generation" else []
        importlib.import_module(f"benchmarks.{name}").run(arguments.data, *others)


if __name__ == "__main__":
    main()
