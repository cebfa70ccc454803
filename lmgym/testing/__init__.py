"""The conformance kit: checks a task of your own, or somebody's trainer, as the built-in ones are checked."""

from lmgym.testing.adapter import GAEInputs, GroupInputs, LossInputs, Responses, RewardInputs, TrainerAdapter
from lmgym.testing.report import Report, Result, TrainerError
from lmgym.testing.tasks import check_task
from lmgym.testing.trainer import check_trainer

__all__ = [
    "GAEInputs",
    "GroupInputs",
    "LossInputs",
    "Report",
    "Responses",
    "Result",
    "RewardInputs",
    "TrainerAdapter",
    "TrainerError",
    "check_task",
    "check_trainer",
]
