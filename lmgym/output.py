"""What a command prints, and the pipe that it goes into."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator

READER_GONE = 141  # 128 + SIGPIPE, what a shell gives for a program that this signal ended


@contextlib.contextmanager
def ending_with_its_reader() -> Iterator[None]:
    """Ends the process without a word where nobody reads its output any more, as in `... --help | head -1`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_reader_gone():
            raise  # it was another pipe
        with open(os.devnull, "wb") as nowhere:  # for what is still in the buffer, which Python writes when it ends
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        sys.exit(READER_GONE)


def _is_reader_gone() -> bool:
    if not hasattr(select, "poll"):
        return True
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll(0))
