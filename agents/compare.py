"""Compares agents: `python -m agents.compare agents=ppo,rloo tasks=reviews,echo-4 seeds=5 [key=value,value ...]`.

Every agent is run on every task with every seed, and with every combination of keys that have several values. What is
there already is not run again, so that the same command goes on after Ctrl-C or a kill. `runs='runs/**'` compares runs
that exist. The directory of a comparison holds a run directory a run, `protocol.yaml` and the report (docs/compare.md).
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word, until there is something to take back

from agents.comparison.run import compare
from agents.runs.defaults import complete_agents
from agents.runs.help_page import compare_help_page
from agents.runs.signals import Stoppable
from agents.runs.surroundings import prepare_process
from agents.runs.sweeps import register
from lmgym.errors import LmGymError
from lmgym.output import ending_with_its_reader


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code, or what is wrong in a line is printed and it is 1."""
    prepare_process()
    register()
    complete_agents()
    if {"--help", "-h"} & set(arguments):
        print(compare_help_page())
        return 0
    try:
        with Stoppable():
            return compare(arguments)
    except KeyboardInterrupt:
        return 130
    except LmGymError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    with ending_with_its_reader():
        code = main(sys.argv[1:])
    sys.exit(code)
