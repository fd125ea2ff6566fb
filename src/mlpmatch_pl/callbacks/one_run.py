"""All processes train the same run."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from mlpmatch_pl.utils.errors import UserError


class OneRun(Callback):
    """Ends a training at its beginning when its processes do not mean the same run.

    Commands that are started by hand on several machines may differ in the run folder, which has the time in its name,
    or find other checkpoints and images there.

    Args:
        facts: What must be equal, by what to call it.

    Raises:
        UserError: On all processes, with the first fact that differs.
    """

    def __init__(self, facts: Mapping[str, str]) -> None:
        self.facts = dict(facts)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare, once the processes are connected and before anything is restored or trained."""
        if trainer.world_size == 1 or stage != "fit":
            return
        told: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(told, self.facts)
        for name, first in told[0].items():
            for rank, others in enumerate(told):
                if others[name] != first:
                    raise UserError(
                        f"expected the same {name} in all processes, but the first has {first}, and number {rank + 1} "
                        f"{others[name]}; give all the same command, with hydra.run.dir, and the same files"
                    )
