"""Rankings under the name that they had before there were records of feedback (`lmgym.feedback.files`)."""

from __future__ import annotations

from lmgym.feedback.files import read_records
from lmgym.feedback.records import Record


class Rankings:
    """`Rankings.load(source)` is `list(read_records(source))`."""

    @staticmethod
    def load(source: object) -> list[Record]:
        """Reads records of feedback, in any layout (`lmgym.feedback.files.read_records`)."""
        return list(read_records(source))
