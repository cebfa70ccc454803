"""Says where the gap of a run's policy to the optimum comes from: `python -m agents.anatomy run=<run directory>`.

It prints tables, and writes `anatomy.json` and `anatomy.png` into the run directory.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to take back

from agents.runs.anatomy import dissect_run
from agents.runs.command_line import run_command
from agents.runs.help_page import anatomy_help_page
from agents.runs.of_a_run import command_of_a_run

main = command_of_a_run("anatomy", dissect_run)

if __name__ == "__main__":
    run_command(main, path_key="run", help_page=anatomy_help_page)
