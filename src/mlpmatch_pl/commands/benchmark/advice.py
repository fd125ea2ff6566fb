"""Which part to change first, and the override to try."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mlpmatch_pl.callbacks.progress import MOST_WAIT
from mlpmatch_pl.commands.benchmark.figures import Schedule
from mlpmatch_pl.commands.benchmark.loading import MOST_WORKERS

TOLERATED = {"data wait": MOST_WAIT, "transfer": 0.05, "optimizer": 0.10, "validation": 0.20}  # shares, 0..1
GOOD_VALIDATION = 0.10  # what the advice aims at


@dataclass(frozen=True)
class Loading:
    """How loading and the step fit together.

    Attributes:
        wait: Seconds a batch is waited for, in a long training.
        workers: Workers there are.
        needed: Workers that would do, None if not even many do.
        cores: Cores that this process may use.
    """

    wait: float
    workers: int
    needed: int | None
    cores: int


@dataclass(frozen=True)
class Hardware:
    """What computes, and how: device type, precision, and the options of the group trainer that make it faster."""

    device: str
    precision: str
    channels_last: bool
    compile_blocks: bool
    fused_optimizer: bool
    clipping: bool


def shares(parts: Mapping[str, float], loading: Loading, schedule: Schedule) -> dict[str, float]:
    """Return the share of each part in its whole: of a batch, and for the validation of the schedule.

    Args:
        parts: Mean seconds by part.
        loading: Its wait replaces the measured one.
        schedule: The whole training.

    Example:
        >>> parts = {"data wait": 0.0, "transfer": 0.1, "forward": 0.3, "backward": 0.5, "optimizer": 0.1}
        >>> plan = Schedule(epochs=1, batches=1, validations=1, training=3.0, validation=1.0)
        >>> found = shares(parts, Loading(wait=1.0, workers=2, needed=4, cores=8), plan)
        >>> found["data wait"], found["backward"], found["validation"]
        (0.5, 0.25, 0.25)
    """
    seconds = {**parts, "data wait": loading.wait}
    whole = sum(seconds.values())
    return {name: value / whole for name, value in seconds.items()} | {"validation": schedule.validation_share}


def first_to_fix(part_shares: Mapping[str, float]) -> str:
    """Return the part that is furthest above what is tolerated, or ``compute``.

    Example:
        >>> first_to_fix({"data wait": 0.2, "transfer": 0.01, "optimizer": 0.05, "validation": 0.3})
        'data wait'
        >>> first_to_fix({"data wait": 0.04, "transfer": 0.01, "optimizer": 0.05, "validation": 0.1})
        'compute'
    """
    excess = {name: part_shares[name] - tolerated for name, tolerated in TOLERATED.items()}
    worst = max(excess, key=lambda name: excess[name])
    return worst if excess[worst] > 0 else "compute"


def sentence(
    part: str, part_shares: Mapping[str, float], loading: Loading, schedule: Schedule, hardware: Hardware
) -> str:
    """Say what to try for a part that `first_to_fix` names."""
    share = part_shares["forward"] + part_shares["backward"] if part == "compute" else part_shares[part]
    percent = f"{100 * share:.0f} %"
    return {
        "data wait": f"data is waited for in {percent} of the time: {workers_sentence(loading)}",
        "transfer": f"the transfer to the device takes {percent} of a batch: a smaller loader.crop_size, or fewer "
        "strong views (method.strong_weights), is less to transfer",
        "optimizer": f"the optimizer takes {percent} of a batch: {optimizer_sentence(hardware)}",
        "validation": f"validation takes {percent} of the schedule: trainer.check_val_every_n_epoch="
        f"{rarer_validation(schedule)} brings it to about {100 * GOOD_VALIDATION:.0f} %",
        "compute": f"forward and backward take {percent} of a batch, nothing else slows it down: "
        f"{compute_sentence(hardware)}",
    }[part]


def workers_sentence(loading: Loading) -> str:
    """Say how many workers it would take.

    Example:
        >>> workers_sentence(Loading(wait=0.5, workers=2, needed=6, cores=8))
        'try loader.num_workers=6 (now 2)'
    """
    if loading.needed is None:
        return f"not even {MOST_WORKERS} workers keep up; keep decoded images with loader.cache=FOLDER"
    # Loading in the main process delays every step: where that was measured, a worker helps even if none is predicted.
    needed = max(loading.needed, 1)
    if needed <= loading.workers:
        return (
            f"{loading.workers} worker{'s' * (loading.workers > 1)} would do on cores of their own, so the "
            f"{loading.cores} cores or the disk are busy; keep decoded images with loader.cache=FOLDER"
        )
    beyond = f"; that is more than the {loading.cores} cores here, so try loader.cache=FOLDER first"
    return f"try loader.num_workers={needed} (now {loading.workers})" + (beyond if needed > loading.cores else "")


def rarer_validation(schedule: Schedule) -> int:
    """Return after how many epochs to validate, so that it takes a tenth of the time.

    Example:
        >>> rarer_validation(Schedule(epochs=100, batches=900, validations=100, training=900.0, validation=300.0))
        3
    """
    epoch, validation = schedule.training / schedule.epochs, schedule.validation / schedule.validations
    return min(math.ceil(validation * (1 - GOOD_VALIDATION) / (GOOD_VALIDATION * epoch)), schedule.epochs)


def optimizer_sentence(hardware: Hardware) -> str:
    """Say what makes the optimizer faster, or its steps fewer.

    Example:
        >>> optimizer_sentence(Hardware("cuda", "bf16-mixed", True, True, fused_optimizer=True, clipping=False))
        'a larger loader.batch_size, or trainer.accumulate_grad_batches, makes its steps fewer'
    """
    fewer = "a larger loader.batch_size, or trainer.accumulate_grad_batches, makes its steps fewer"
    # Lightning refuses to clip the gradients of a fused optimizer in mixed precision.
    refused = hardware.clipping and hardware.precision.endswith("mixed")
    if hardware.device == "cuda" and not hardware.fused_optimizer and not refused:
        return f"try trainer.fused_optimizer=true first; {fewer}"
    return fewer


def compute_sentence(hardware: Hardware) -> str:
    """Say what makes forward and backward passes faster.

    Example:
        >>> compute_sentence(Hardware("cuda", "bf16-mixed", False, False, fused_optimizer=True, clipping=False))
        'try trainer.channels_last=true, then trainer.compile_blocks=true'
    """
    if hardware.device == "cpu":
        other = "a smaller loader.crop_size or backbone is faster, a GPU much more"
        return other if hardware.precision.startswith("bf16") else f"try trainer.precision=bf16-mixed; {other}"
    if hardware.precision.startswith("32"):
        return "try trainer=gpu (bfloat16 and channels-last)"
    used = {"channels_last": hardware.channels_last, "compile_blocks": hardware.compile_blocks}
    if untried := [f"trainer.{option}=true" for option, on in used.items() if not on]:
        return f"try {', then '.join(untried)}"
    return "a smaller loader.crop_size or backbone is faster, what speeds up the same training is in use already"
