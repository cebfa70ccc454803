"""Commands for human feedback: `python -m lmgym.feedback serve to_label.jsonl`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lmgym.errors import LmGymError, check_choice
from lmgym.feedback.options import read_options
from lmgym.feedback.serving import ServeOptions, serve

USAGE = """\
python -m lmgym.feedback serve TO_LABEL [NAME=VALUE ...]

Serves the labelling page for a file of records. The names, with their defaults:
{options}
"""


def main(words: Sequence[str]) -> None:
    """Runs a command."""
    if not words or {"-h", "--help"} & set(words):
        defaults = "".join(f"  {name}={value}\n" for name, value in vars(ServeOptions()).items())
        print(USAGE.format(options=defaults), end="")
        return
    command, *rest = words
    try:
        check_choice("command", command, ("serve",))
        if not rest or "=" in rest[0]:
            raise LmGymError("`serve` needs a file of records: python -m lmgym.feedback serve to_label.jsonl")
        serve(rest[0], read_options(ServeOptions, rest[1:]))
    except LmGymError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
