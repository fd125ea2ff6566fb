"""The processes of a run: how they were started, what they share, and what to say when one is lost.

torchrun and srun start all processes at once. Without them Lightning starts the others from the first one, after
everything has been checked. What is needed before they are connected is read from the environment, without torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

from mlpmatch_pl.utils.errors import UserError

_INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs in which Lightning starts the processes, not srun
_LOST = re.compile(
    r"Connection (?:closed|reset) by peer|Broken pipe|[Ss]ocket closed|recvBytes failed|Timed out waiting|Read timeout"
    r"|Unexpected .*byte|remote process exited|[Cc]ommunicator was aborted|Watchdog caught|collective operation timeout"
)


@dataclass(frozen=True)
class Launch:
    """How this process was started, as its environment says.

    Attributes:
        by: ``torchrun``, ``srun``, or ``Lightning``, which starts as many as are configured.
        here: Number of processes that were started on a machine; 0 if Lightning starts them.
        everywhere: Number of processes that were started on all machines; 0 if Lightning starts them.
        first: Whether this is the first process of the run.
        first_here: Whether this is the first process on its machine.

    Example:
        >>> launch = Launch.of({"TORCHELASTIC_RUN_ID": "x", "RANK": "2", "LOCAL_RANK": "0",
        ...                     "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})
        >>> launch.by, launch.here, launch.everywhere, launch.first, launch.first_here
        ('torchrun', 2, 4, False, True)
    """

    by: str
    here: int
    everywhere: int
    first: bool
    first_here: bool

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Launch:
        """Read an environment; in the order in which Lightning does."""

        def number(key: str, default: str = "0") -> int:
            return int(environment.get(key, default))

        if "TORCHELASTIC_RUN_ID" in environment:
            first, first_here = number("RANK") == 0, number("LOCAL_RANK") == 0
            return cls("torchrun", number("LOCAL_WORLD_SIZE"), number("WORLD_SIZE"), first, first_here)
        if "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in _INTERACTIVE:
            tasks = number("SLURM_NTASKS")
            here = number("SLURM_NTASKS_PER_NODE", str(tasks))
            return cls("srun", here, tasks, number("SLURM_PROCID") == 0, number("SLURM_LOCALID") == 0)
        first_here, first_machine = number("LOCAL_RANK") == 0, number("NODE_RANK") == 0
        return cls("Lightning", 0, 0, first_here and first_machine, first_here)

    def check(self, devices: int, machines: int) -> None:
        """Refuse another number of processes than the trainer's: each would train for itself, or wait for ever.

        Args:
            devices: Processes on a machine, as configured.
            machines: Machines, as configured.

        Raises:
            UserError: If they differ from what was started.
        """
        if self.here and (self.here, self.everywhere) != (devices, devices * machines):
            raise UserError(
                f"expected the {devices} x {machines} processes of trainer.devices={devices} and "
                f"trainer.num_nodes={machines}, but {self.by} has started {self.everywhere}, {self.here} on a machine; "
                "make them equal: torchrun --nproc_per_node and --nnodes, srun --ntasks-per-node and --nodes"
            )


def time_stamp(environment: Mapping[str, str]) -> str:
    """Return the name that all processes of a run give to its folder: its time, or its job and step under srun.

    The jobs of an array may start in one second: a single process has its job's number beside the time.

    Example:
        >>> srun = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0"}
        >>> time_stamp(srun)
        'job4711.0'
        >>> time_stamp({"SLURM_JOB_ID": "4711"}).partition("_job")[2]
        '4711'
    """
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    launch = Launch.of(environment)
    job, step = environment.get("SLURM_JOB_ID"), environment.get("SLURM_STEP_ID")
    if launch.everywhere <= 1:
        return now if job is None else f"{now}_job{job}" + ("" if step is None else f".{step}")
    if launch.by == "srun":
        return f"job{job}.{step or 0}"
    return _agreed(now, environment)


def _agreed(value: str, environment: Mapping[str, str]) -> str:
    """Return what the first process to ask has said, from the store through which torchrun connects them."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)
    return str(store.compare_set("mlpmatch_pl/time_stamp", "", value).decode())


@contextmanager
def loss_of_a_process_explained(processes: int) -> Iterator[None]:
    """Turn what a process meets when another one has gone into one sentence; other errors pass.

    Args:
        processes: Number of processes of the run.

    Raises:
        UserError: If another process has ended or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if processes == 1 or not (found := _LOST.search(str(error))):
            raise
        raise UserError(
            f"expected all {processes} processes to go on, but another one has ended or does not answer "
            f"({found[0]}); see what it said or what killed it, and go on with resume=auto"
        ) from error
