"""Kill a training with SIGKILL again and again, resume it each time, and compare with one that was left alone.

    python tests/campaigns/kill.py --kills 24 --seed 0 --out kill.json

Every start is a separate process: ``train`` with ``resume=auto``. Kills come at random times, and every second one
while a checkpoint is being written. At the end, weights, optimizer, metrics.csv (the last occurrence of each row),
metrics.json and the pictures must be those of the undisturbed run, bit for bit. Only the row of a step may be missing
from metrics.csv, if the kill came between the step's checkpoint and the row.
"""

import argparse
import csv
import json
import logging
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from hydra import compose, initialize_config_module

import mlpmatch_pl.commands.train  # noqa: F401  # once, for all the processes that are forked from this one
from mlpmatch_pl.train import train

TINY = (
    "dataset.train=24", "dataset.val=5", "dataset.test=3", "dataset.labeled=4", "dataset.size=48",
    "loader.crop_size=48",
    "loader.batch_size=4", "decoder.channels=8", "schedule.steps=30", "callbacks.predictions.num_images=2",
    "callbacks.checkpoint.every_n_steps=2", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "resume=auto",
)  # fmt: skip
"""Six epochs of five steps, with a checkpoint after every second step."""
PATIENCE = 300  # seconds after which a process counts as hanging


@dataclass
class Campaign:
    """What was done, and what came out of it."""

    kills: int = 0
    kills_while_writing: int = 0
    starts: int = 0
    runs: int = 0
    killed_at_step: list[int] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def start(folder: Path, overrides: tuple[str, ...]) -> int:
    """Start a training in a new process, and return its id; what it prints goes to the folder's log."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    code = 1
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        with initialize_config_module("mlpmatch_pl.conf", version_base="1.3"):
            cfg = compose("train", [*TINY, *overrides, f"output_dir={folder}"])
        train(cfg)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(process: int) -> int | None:
    """Return the exit code of a process that has ended (negative: the signal that killed it), else None."""
    done, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def run(folder: Path, overrides: tuple[str, ...] = ()) -> float:
    """Let a training run to its end, and return its seconds."""
    began, process = time.monotonic(), start(folder, overrides)
    while (code := ended(process)) is None:
        if time.monotonic() - began > PATIENCE:
            os.kill(process, signal.SIGKILL)
            raise SystemExit(f"a training hangs, see {folder.with_suffix('.log')}")
        time.sleep(0.01)
    if code:
        raise SystemExit(f"a training ended with {code}, see {folder.with_suffix('.log')}")
    return time.monotonic() - began


def kill_once(folder: Path, overrides: tuple[str, ...], seconds: float, while_writing: bool) -> bool:
    """Start a training and kill it after some time, or then when the next checkpoint is being written.

    Returns:
        Whether it was killed: it may have ended before.
    """
    process, due = start(folder, overrides), time.monotonic() + seconds
    while True:
        if (code := ended(process)) is not None:
            if code:
                raise SystemExit(f"a training ended with {code}, see {folder.with_suffix('.log')}")
            return False
        if time.monotonic() >= due + PATIENCE:
            os.kill(process, signal.SIGKILL)
            raise SystemExit(f"a training hangs, see {folder.with_suffix('.log')}")
        if time.monotonic() >= due and (not while_writing or writing(folder)):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return True
        time.sleep(0.0002 if while_writing else 0.005)


def writing(folder: Path) -> bool:
    """Tell whether a checkpoint is being written, or was when the process was killed."""
    return any((folder / "checkpoints").glob("*.unfinished"))


def disturb(
    folder: Path, overrides: tuple[str, ...], seconds: float, chance: random.Random, campaign: Campaign
) -> None:
    """Train with kills until the training ends."""
    campaign.runs += 1
    while True:
        campaign.starts += 1
        for path in (folder / "checkpoints").glob("*.unfinished"):
            path.unlink()  # so that the next one found is new
        if not kill_once(folder, overrides, chance.uniform(0, seconds), campaign.kills % 2 == 1):
            return
        campaign.kills += 1
        campaign.kills_while_writing += writing(folder)
        campaign.killed_at_step.append(steps_saved(folder))


def steps_saved(folder: Path) -> int:
    """Return the step of last.ckpt, or of the one before."""
    for name in ("last.ckpt", "last-1.ckpt"):
        path = folder / "checkpoints" / name
        if path.exists():
            return int(torch.load(path, weights_only=True)["global_step"])
    return 0


def differences(straight: Path, disturbed: Path) -> list[str]:
    """Name what differs between the results of two runs."""
    found = []
    for name in ("last", "best"):
        one, two = (
            torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for run in (straight, disturbed)
        )
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
            if not same(one[part], two[part]):
                found.append(f"{name}.ckpt: {part}")
    before, after = rows(straight), rows(disturbed)
    at_checkpoint = {f"{2 * step - 1}" for step in range(1, 100)} | {f"{5 * step - 1}" for step in range(1, 100)}
    found += [f"metrics.csv: {key}" for key in before if before[key] != after.get(key, before[key])]
    found += [f"metrics.csv lacks {key}" for key in before if key not in after and key[0] not in at_checkpoint]
    found += [f"metrics.csv has {key}" for key in after if key not in before]
    one, two = (json.loads((run / "metrics.json").read_text()) for run in (straight, disturbed))
    one["best"].pop("checkpoint"), two["best"].pop("checkpoint")
    found += [f"metrics.json: {key}" for key in ("steps", "best", "last", "test", "labeled") if one[key] != two[key]]
    pictures = [{p.name: p.read_bytes() for p in (run / "predictions").iterdir()} for run in (straight, disturbed)]
    if pictures[0] != pictures[1]:
        found.append("predictions")
    return found


def rows(run: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """Return the rows of metrics.csv by step and columns, the last of those that were repeated."""
    with (run / "metrics.csv").open(newline="") as file:
        filled = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    return {(row["step"], *sorted(row)): row for row in filled}


def same(one: object, two: object) -> bool:
    """Compare nested plain data and tensors bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def campaign(kills: int, seed: int, overrides: tuple[str, ...], place: Path) -> dict[str, object]:
    """Kill at least so many times, over as many runs as it takes."""
    torch.set_num_threads(1)
    result, chance = Campaign(), random.Random(seed)
    seconds = run(place / "straight", overrides)
    while result.kills < kills:
        folder = place / f"disturbed{result.runs}"
        disturb(folder, overrides, seconds, chance, result)
        result.differences += [f"{folder.name}: {line}" for line in differences(place / "straight", folder)]
        print(f"run {result.runs}: {result.kills} kills, {len(result.differences)} differences", flush=True)
    return {**asdict(result), "seed": seed, "seconds_undisturbed": round(seconds, 1), "overrides": list(overrides)}


def main() -> None:
    """Run the campaign and write what came out of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for the runs; a temporary one if left out")
    parser.add_argument("overrides", nargs="*", help="more settings of the training, such as loader.num_workers=2")
    options = parser.parse_args()
    place = options.keep or Path(tempfile.mkdtemp(prefix="kill-"))
    place.mkdir(parents=True, exist_ok=True)
    result = campaign(options.kills, options.seed, tuple(options.overrides), place)
    result |= {"torch": torch.__version__, "python": platform.python_version(), "system": platform.system()}
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)
    if not options.keep:
        shutil.rmtree(place)
    sys.exit(bool(result["differences"]))


if __name__ == "__main__":
    main()
