"""Grades a finished (or interrupted) run again, to the same table: `python -m agents.evaluate run=<run directory>`."""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to take back

from agents.runs.command_line import run_command
from agents.runs.help_page import evaluate_help_page
from agents.runs.of_a_run import command_of_a_run
from agents.runs.regrade import regrade

main = command_of_a_run("evaluate", regrade)

if __name__ == "__main__":
    run_command(main, path_key="run", help_page=evaluate_help_page)
