"""The filter of overlong episodes: what the length limit has cut is left out of the update."""

from __future__ import annotations

import torch

from agents.batch import Batch
from agents.faults.fault import Fault
from lmgym.errors import InvalidArgumentError


class OverlongFilter(Fault):
    """Leaves episodes without an EOS out of the update, after their advantages (DAPO: Yu et al. 2025, section 3.4).

    Baselines are of all episodes, as they are where a loss is masked. Without the filter an episode that was cut is
    learned from like any other, with the score of what is there of it.
    """

    key = "overlong"

    def filter(self, batch: Batch) -> Batch:
        episodes = batch.episodes
        last = episodes.response_ids.gather(1, (episodes.lengths - 1).unsqueeze(1)).squeeze(1).cpu()
        is_eos = torch.from_numpy(self.learner.envs.engine.is_eos)[last]
        self.metrics = {"train/overlong_fraction": 1 - is_eos.float().mean().item()}
        rows = is_eos.nonzero().squeeze(1)
        if len(rows) < self.learner.config.minibatches:
            raise InvalidArgumentError(
                f"`overlong` must be null where the length limit cuts nearly all: {len(rows)} of {len(batch)} episodes "
                f"of a batch have ended by themselves, and {self.learner.config.minibatches} minibatches need one each."
            )
        return batch[rows.to(episodes.response_ids.device)]
