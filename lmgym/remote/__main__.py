"""Serves a model to trainers on this machine: `python -m lmgym.remote MODEL port=8000`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from lmgym.errors import InvalidArgumentError, LmGymError, check_int
from lmgym.feedback.options import read_options

_HELP = """python -m lmgym.remote MODEL [NAME=VALUE ...]

Serves a model by the calls of vLLM that a trainer makes of it (docs/engine.md), until Ctrl-C. MODEL is a directory or
a hub name, or a task whose reference is one.
The names, with their defaults:
  host=127.0.0.1   the address to listen on; whoever reaches it may have it read models from directories
  port=8000        to listen on; 0 takes a free one
  seed=0           of tokens that are drawn without a trainer's numbers
How it is to be wrong:
  dtype=float32    of weights and computations; or bfloat16
  temperature=1    divides logits once more
  stale=0          samples from the weights of so many pushes ago

Example: python -m lmgym.remote reviews port=8000
"""


@dataclass(frozen=True)
class Options:
    """What the command takes, as its help says."""

    host: str = "127.0.0.1"
    port: int = 8000
    seed: int = 0
    dtype: str = "float32"
    temperature: float = 1.0
    stale: int = 0


def main(words: Sequence[str]) -> None:
    """Runs the command."""
    if not words or {"-h", "--help"} & set(words):
        print(_HELP, end="")
        return
    try:
        options = read_options(Options, words[1:])
        check_int("port", options.port, 0, 65535)
        serve(words[0], options)
    except (LmGymError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def serve(name: str, options: Options) -> None:
    """Serves a model until it is interrupted.

    Args:
        name: of a model or a task. options: of the command.
    """
    from lmgym.remote.served import ServedModel, Wrong
    from lmgym.remote.server import Server

    wrong = Wrong(options.dtype, options.temperature, options.stale)
    server = Server(ServedModel(find_model(name), wrong, options.seed), options.host, options.port)
    print(f"Serving {server.served.name} at {server.url} (Ctrl-C ends it).", flush=True)
    server.serve_forever()


def find_model(name: str) -> str:
    """The directory or hub name of a model, or of a task's reference.

    Raises:
        InvalidArgumentError: for what cannot be one, and for a task whose reference is neither.
    """
    from lmgym.models.names import check_model_name
    from lmgym.tasks.registry import make_task, registered_tasks

    if name not in registered_tasks():
        check_model_name("MODEL", name)
        return name
    model = make_task(name).model
    if not isinstance(model, str):
        raise InvalidArgumentError(f"`MODEL` must have weights in a directory, and the reference of {name} is a table.")
    return model


if __name__ == "__main__":
    main(sys.argv[1:])
