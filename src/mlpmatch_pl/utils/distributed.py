"""How the processes of a run were started."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from mlpmatch_pl.utils.errors import UserError

STORE_SECONDS = 5
_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID")

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment


def cluster_environment() -> ClusterEnvironment:
    """Return how this process was started: by torchrun, by srun, or by Lightning, which starts the others itself.

    SLURM jobs are not requeued by Lightning: the run saves and exits on a signal, and its script decides.

    Raises:
        UserError: If srun started several tasks without a number of tasks per node.
    """
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if TorchElasticEnvironment.detect():  # before SLURM, as in Lightning: torchrun may run inside a SLURM job
        return TorchElasticEnvironment()
    if "SLURM_STEP_ID" in os.environ and SLURMEnvironment.detect():
        if int(tasks := os.environ["SLURM_NTASKS"]) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise UserError(
                f"expected the number of tasks per node beside {tasks} tasks of srun, but SLURM_NTASKS_PER_NODE is not "
                "set; use srun --ntasks-per-node with the value of trainer.devices"
            )
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


def refuse_leftovers(environment: Mapping[str, str], several: bool) -> None:
    """Refuse ranks that no launcher has set, with which a process would wait for ever or write no results.

    Args:
        environment: The environment variables.
        several: Whether several processes are to train.

    Raises:
        UserError: If ranks are set without what a launcher sets beside them, or are out of range.

    Example:
        >>> refuse_leftovers({"LOCAL_RANK": "1"}, several=False)
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected WORLD_SIZE, MASTER_ADDR, MASTER_PORT beside LOCAL_RANK=1 in ...
    """
    ranks = {name: environment[name] for name in ("RANK", "LOCAL_RANK") if name in environment}
    if not several and set(ranks.values()) <= {"0"}:  # as Lightning leaves it behind in its own process
        return
    advice = "start the processes with torchrun, or remove what is left over: unset RANK LOCAL_RANK WORLD_SIZE"
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    world = environment.get("WORLD_SIZE", "")
    for name, value in ranks.items():
        if missing:
            raise UserError(f"expected {', '.join(missing)} beside {name}={value} in the environment; {advice}")
        if not value.isdecimal() or not world.isdecimal() or int(value) >= int(world):
            raise UserError(f"expected {name} from 0 to below WORLD_SIZE={world}, but got {value}; {advice}")
    if ranks:
        refuse_ended_torchrun(environment)


def refuse_other_numbers(environment: Mapping[str, str], devices: int, nodes: int) -> None:
    """Refuse ranks and sizes that fit another number of processes, as Lightning does for torchrun and srun.

    Args:
        environment: The environment variables.
        devices: Number of processes on each machine.
        nodes: Number of machines.

    Raises:
        UserError: For the first variable that contradicts the numbers.

    Example:
        >>> refuse_other_numbers({"NODE_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}, 4, nodes=2)
        >>> refuse_other_numbers({"NODE_RANK": "1"}, 1, nodes=1)
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected NODE_RANK=0, as trainer.devices=1 and trainer.num_nodes=1 ...
    """
    if any(name in environment for name in _LAUNCHERS):
        return
    machine = "NODE_RANK" if "NODE_RANK" in environment else "GROUP_RANK"
    node, local = int(environment.get(machine, 0)), int(environment.get("LOCAL_RANK", 0))
    expected: dict[str, Sequence[int]] = {machine: range(nodes), "LOCAL_RANK": range(devices)}
    if "RANK" in environment or "LOCAL_RANK" in environment:  # Lightning ignores WORLD_SIZE otherwise
        expected |= {"RANK": [node * devices + local], "WORLD_SIZE": [devices * nodes]}
    for name, numbers in expected.items():
        found = environment.get(name)
        if name == "LOCAL_RANK" and "RANK" in environment and devices > 1:
            found = found or "none"  # Lightning would start processes that inherit this RANK
        if found is not None and found not in map(str, numbers):
            raise UserError(
                f"expected {name}={' or '.join(map(str, numbers))}, as trainer.devices={devices} and "
                f"trainer.num_nodes={nodes} say, but the environment has {found}; change these options, or remove what "
                f"is left over: unset RANK LOCAL_RANK {machine} WORLD_SIZE"
            )


def refuse_ended_torchrun(environment: Mapping[str, str]) -> None:
    """Refuse the environment of a torchrun that has ended. While it runs, it serves the store of its processes.

    Raises:
        UserError: If nothing listens at the store's address.

    Example:
        >>> refuse_ended_torchrun(
        ...     {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
        ... )
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected torchrun at 127.0.0.1:9, as MASTER_ADDR and MASTER_PORT say, ...
    """
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # then the first process serves the store
        return
    host, port = environment["MASTER_ADDR"], environment["MASTER_PORT"]
    try:
        socket.create_connection((host, int(port)), timeout=STORE_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"expected torchrun at {host}:{port}, as MASTER_ADDR and MASTER_PORT say, but nothing listens there; start "
            "the processes with torchrun, or remove what an earlier one has left over: unset "
            "${!TORCHELASTIC_*} RANK LOCAL_RANK WORLD_SIZE"
        ) from error


def tasks_without_srun(environment: Mapping[str, str]) -> int:
    """Return the number of tasks of a SLURM job whose processes srun did not start, 0 otherwise.

    Only srun sets SLURM_STEP_ID; a batch script or an interactive session has the job's other variables.

    Example:
        >>> tasks_without_srun({"SLURM_NTASKS": "4"}), tasks_without_srun({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"})
        (4, 0)
    """
    return 0 if "SLURM_STEP_ID" in environment else int(environment.get("SLURM_NTASKS", 0))


def waits_for_others(environment: Mapping[str, str]) -> bool:
    """Tell whether the environment alone says that somebody starts the other processes, by a launcher unknown here.

    Example:
        >>> waits_for_others({"LOCAL_RANK": "0"}), waits_for_others({"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"})
        (True, False)
    """
    return "LOCAL_RANK" in environment and not any(name in environment for name in _LAUNCHERS)


def is_first_process() -> bool:
    """Tell whether this is the first process of the run, also before the processes are connected."""
    environment = cluster_environment()
    return environment.local_rank() == 0 and environment.node_rank() == 0


def time_stamp(environment: Mapping[str, str]) -> str:
    """Return a name for the run folder that all processes of a run agree on.

    That is the time, in a SLURM job with the job's number (the jobs of an array may start in the same second), and the
    number alone for several tasks of srun. It needs no torch, except under torchrun.

    Example:
        >>> time_stamp({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0"})
        'job4711.0'
        >>> time_stamp({"SLURM_JOB_ID": "4711"}).partition("_job")[2]
        '4711'
    """
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    if int(environment.get("WORLD_SIZE", 1)) > 1 and "TORCHELASTIC_RUN_ID" in environment:
        return _agree(now, environment)
    job, step = environment.get("SLURM_JOB_ID"), environment.get("SLURM_STEP_ID")
    if job is None:
        return now
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")  # srun does not start the processes
    if step is not None and int(environment.get("SLURM_NTASKS", 1)) > 1 and not interactive:
        return f"job{job}.{step}"
    return f"{now}_job{job}" + ("" if step is None else f".{step}")


def _agree(value: str, environment: Mapping[str, str]) -> str:
    """Return the value of the first process to call this, from the store through which torchrun connects them."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    refuse_ended_torchrun(environment)
    store = TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False)
    return str(store.compare_set("mlpmatch_pl/time_stamp", "", value).decode())
