"""One process writes a run directory at a time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from lmgym.files import RunFileError, refuse_link

LOCK = ".lock"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Lock:
    """The right to write a run directory, held until the block ends or the process does, killed or not.

    The operating system holds it (`flock`), on the file `.lock`, which names the process for others and goes away with
    the lock. A file system without locks is warned of: there nothing keeps a second process away.

    Raises:
        RunFileError: where another process has it, with its id and host, or where nothing can be written.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        refuse_link(self.path)
        while True:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            except OSError as error:
                raise RunFileError(f"`{self.path}` must be a file that can be written: {error.strerror}.") from error
            try:
                self._take(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if self._is_there(descriptor):
                break
            os.close(descriptor)  # its owner has removed it between the two calls
        self._descriptor = descriptor
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        except BaseException:
            os.close(descriptor)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._descriptor is not None
        try:
            if self._is_there(self._descriptor):
                with contextlib.suppress(OSError):  # a file that is open cannot be removed everywhere
                    self.path.unlink()
        finally:
            os.close(self._descriptor)

    def _take(self, descriptor: int) -> None:
        try:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunFileError(
                f"`{self.path.parent}` must be written by one process at a time, and {self._owner()} is writing it: "
                "wait until it has ended, or stop it."
            ) from error
        except (ImportError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _WITHOUT_LOCKS:
                raise
            print(
                f"{self.path.parent} lies on a file system without locks: nothing keeps a second process from writing "
                "the same run.",
                file=sys.stderr,
            )

    def _is_there(self, descriptor: int) -> bool:
        """Whether the file that is open is still the one of that name."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def _owner(self) -> str:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return f"process {content['pid']} on {content['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"
