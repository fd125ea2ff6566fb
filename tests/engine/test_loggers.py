import json
import logging
import os
import time

import pytest
from helpers import TINY, compose_train, run_command

from mlpmatch_pl.data.splits import Split
from mlpmatch_pl.engine.loggers import MetricsCSV, build_loggers, wandb_mode
from mlpmatch_pl.train import train
from mlpmatch_pl.utils.errors import UserError


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def test_wandb_is_online_only_with_credentials(monkeypatch, tmp_path):
    assert wandb_mode(None) == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_mode(None) == "online"
    assert wandb_mode("offline") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(None) == "disabled"
    with pytest.raises(UserError, match="but got 'on'"):
        wandb_mode("on")


def test_wandb_offline_writes_a_run_with_its_metrics_and_leaves_no_trace_in_the_process(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        for seed in (0, 1):
            train(
                compose_train(
                    *TINY,
                    "logger=wandb",
                    "trainer.log_every_n_steps=1",
                    f"seed={seed}",
                    output_dir=tmp_path / f"run{seed}",
                )
            )
    assert sum("W&B: offline" in record.message for record in caplog.records) == 2
    assert "WANDB_MODE" not in os.environ
    for seed in (0, 1):  # a run of its own for each job, because the one before was finished
        (offline,) = (tmp_path / f"run{seed}" / "wandb").glob("offline-run-*")
        (record,) = offline.glob("*.wandb")
        content = record.read_bytes()
        assert b"train/loss_u_np" in content
        assert b"val/miou" in content
        assert b"4 (seed 0)" in content  # the labeled list, in the run's configuration


@pytest.mark.slow
def test_wandb_without_network_falls_back_to_offline(tmp_path):
    result = run_command(
        *TINY,
        "logger=wandb",
        "hydra.run.dir=run",
        cwd=tmp_path,
        WANDB_API_KEY="0" * 40,
        WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_INIT_TIMEOUT="5",
    )
    assert result.returncode == 0, result.stderr
    assert "logging offline instead" in result.stdout + result.stderr
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert offline.name.endswith((tmp_path / "run" / "wandb_id.txt").read_text().strip())


def test_metrics_csv_goes_on_after_a_restart(tmp_path):
    first = MetricsCSV(str(tmp_path))
    first.log_metrics({"loss": 1.0}, step=1)
    first.save()
    second = MetricsCSV(str(tmp_path))
    second.log_metrics({"loss": 0.5, "miou": 0.2}, step=2)
    second.save()
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert rows == ["loss,miou,step", "1.0,,1", "0.5,0.2,2"]


def test_tensorboard_writes_into_the_run_folder(tmp_path):
    train(compose_train(*TINY, "logger=tensorboard", output_dir=tmp_path))
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise ModuleNotFoundError("tensorboard")

    monkeypatch.setattr("mlpmatch_pl.engine.loggers.TensorBoardLogger", missing)
    with pytest.raises(UserError, match=r"pip install 'mlpmatch_pl\[tensorboard\]'"):
        build_loggers({"logger": {"wandb": None, "tensorboard": True}}, tmp_path, Split("list", ("a",)))


def test_rows_after_the_checkpoint_and_a_cut_off_line_are_left_out_when_a_run_goes_on(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,step,train/loss,val/miou\r\n0,1,0.5,\r\n0,1,,0.25\r\n1,2,0.375,\r\n1,3,0.2"
    )
    MetricsCSV(str(tmp_path)).go_on(2, {"train/loss": 0.5}, log_every_n_steps=2)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "epoch,step,train/loss,val/miou",
        "0,1,0.5,",
        "0,1,,0.25",
    ]


TWO_NUMBERINGS = "epoch,step,train/loss,val/miou\r\n1,8,0.5,\r\n1,9,,0.25\r\n2,6,0.4,\r\n2,7,0.3,\r\n2,8,0.2,\r\n"


@pytest.mark.parametrize(
    ("step", "count", "rows"),
    [
        (7, 3, ["1,8,0.5,", "1,9,,0.25", "2,6,0.4,"]),  # after the row of its last step
        (7, 2, ["1,8,0.5,", "1,9,,0.25", "2,6,0.4,"]),  # before it, as within an epoch
        (10, 2, ["1,8,0.5,", "1,9,,0.25"]),  # written when epochs had more steps; what came after it had fewer
        (10, 9, ["1,8,0.5,", "1,9,,0.25", "2,6,0.4,", "2,7,0.3,", "2,8,0.2,"]),
        (0, 0, []),
    ],
)
def test_rows_come_after_the_checkpoint_by_their_place_not_by_their_step(step, count, rows, tmp_path):
    (tmp_path / "metrics.csv").write_text(TWO_NUMBERINGS)
    MetricsCSV(str(tmp_path)).go_on(step, {}, log_every_n_steps=1, count=count)
    left = (tmp_path / "metrics.csv").read_text().splitlines()[1:] if rows else list(tmp_path.iterdir())
    assert left == rows


@pytest.mark.parametrize(("every", "rows"), [(1, ["0,1,0.5", "1,2,0.375"]), (2, ["0,1,0.5"])])
def test_a_row_that_a_kill_kept_from_being_written_comes_from_the_checkpoint(every, rows, tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss\r\n0,1,0.5\r\n1,2,0.3")  # killed in the middle of it
    metrics = {"train/loss": 0.375, "val/miou": 0.1, "epoch": 1}
    MetricsCSV(str(tmp_path)).go_on(3, metrics, every)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["epoch,step,train/loss", *rows]


def test_a_kill_while_the_header_grows_loses_no_row(tmp_path, monkeypatch):
    first = MetricsCSV(str(tmp_path))
    first.log_metrics({"loss": 1.0}, step=1)
    first.save()
    before = (tmp_path / "metrics.csv").read_bytes()

    def die(*names):
        raise SystemExit

    monkeypatch.setattr("os.fsync", die)
    first.log_metrics({"miou": 0.2}, step=2)
    with pytest.raises(SystemExit):
        first.save()
    assert (tmp_path / "metrics.csv").read_bytes() == before


@pytest.mark.slow
def test_wandb_and_tensorboard_go_on_with_the_same_run(tmp_path):
    run = [*TINY, "logger=wandb", "logger.tensorboard=true", "trainer.log_every_n_steps=1", "resume=auto"]
    for epochs in (1, 2):
        train(compose_train(*run, "schedule.steps=null", f"schedule.epochs={epochs}", output_dir=tmp_path))
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    offline = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert [path.name.rpartition("-")[2] for path in offline] == [run_id] * 2  # `wandb sync` joins them
    for path, steps in zip(offline, (range(6), range(5, 11)), strict=True):  # the test's is last
        end = time.monotonic() + 60
        while set(wandb_steps(path)) != set(steps) and time.monotonic() < end:  # W&B's own process writes the file
            time.sleep(0.5)
        assert sorted(set(wandb_steps(path))) == [*steps]
    assert len(list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))) >= 2
    assert tensorboard_steps(tmp_path / "tensorboard") == list(range(10))


def wandb_steps(folder):
    """Read the steps of the history from W&B's own file: protobuf records in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    content, place, data, found = path.read_bytes(), 7, b"", []
    while place < len(content):
        if (left := 32768 - place % 32768) < 7:  # a block's rest is padding
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        data += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record.FromString(data)
            items = record.history.item
            found += [
                json.loads(i.value_json) for i in items if "trainer/global_step" in (i.key, "/".join(i.nested_key))
            ]
            data = b""
    return found


def tensorboard_steps(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]
