import json
import logging
import os
import time

import pytest
import wandb
from helpers import TINY, compose_train
from mlflow import MlflowClient
from omegaconf import OmegaConf

from mlpmatch_pl.data.splits import Split
from mlpmatch_pl.engine.loggers import MetricsCSV, build_loggers, finish_wandb, wandb_mode
from mlpmatch_pl.train import train
from mlpmatch_pl.utils.errors import UserError

SILENT = ("callbacks.predictions=null", "callbacks.confusion=null")


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


def test_wandb_without_network_falls_back_to_offline(tmp_path, monkeypatch, caplog):
    for key, value in {"API_KEY": "0" * 40, "BASE_URL": "http://127.0.0.1:9", "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    settings = wandb.Settings
    monkeypatch.setattr(wandb, "Settings", lambda **options: settings(**{**options, "init_timeout": 2}))
    config = compose_train(*TINY, "logger=wandb", output_dir=tmp_path)
    try:
        logger = build_loggers(OmegaConf.to_container(config, resolve=True), tmp_path, Split("list", ("a",)))[1]
        assert "logging offline instead" in caplog.text
        assert logger.experiment.settings.mode == "offline"
    finally:
        finish_wandb(0)
    (offline,) = (tmp_path / "wandb").glob("offline-run-*")
    assert offline.name.endswith((tmp_path / "wandb_id.txt").read_text().strip())


def test_metrics_csv_is_appended_to_and_grows_columns(tmp_path):
    first = MetricsCSV(str(tmp_path))
    first.log_metrics({"loss": 1.0}, step=1)
    first.log_metrics({"miou": 0.5}, step=1)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("0.2")  # a kill cut the line off
    second = MetricsCSV(str(tmp_path))
    second.log_metrics({"loss": 0.5, "acc": 0.2}, step=1)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "acc,loss,miou,step",
        ",1.0,,1",
        ",,0.5,1",
        "0.2,0.5,,1",
    ]


@pytest.mark.parametrize("content", [b"", b"epoch,st"])
def test_metrics_csv_that_was_killed_in_its_header_starts_again(content, tmp_path):
    (tmp_path / "metrics.csv").write_bytes(content)
    MetricsCSV(str(tmp_path)).log_metrics({"loss": 1.0}, step=1)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["loss,step", "1.0,1"]


def test_a_kill_while_a_column_is_added_loses_no_row(tmp_path, monkeypatch):
    first = MetricsCSV(str(tmp_path))
    first.log_metrics({"loss": 1.0}, step=1)
    before = (tmp_path / "metrics.csv").read_bytes()

    def die(*names):
        raise SystemExit

    monkeypatch.setattr("os.fsync", die)
    with pytest.raises(SystemExit):
        first.log_metrics({"miou": 0.2}, step=2)
    assert (tmp_path / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("logger", "options"),
    [
        ("TensorBoardLogger", {"tensorboard": True}),
        ("MLFlowLogger", {"mlflow": {"experiment": "a", "tracking_uri": "b"}}),
    ],
)
def test_a_logger_that_is_not_installed_is_named(logger, options, tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise ModuleNotFoundError("tensorboard")

    monkeypatch.setattr(f"mlpmatch_pl.engine.loggers.{logger}", missing)
    with pytest.raises(UserError, match=r"pip install 'mlpmatch_pl\[(tensorboard|mlflow)\]'"):
        build_loggers(
            {"logger": {"wandb": None, "tensorboard": False, "mlflow": None, **options}},
            tmp_path,
            Split("list", ("a",)),
        )


def test_wandb_tensorboard_and_mlflow_continue_the_same_run(tmp_path, caplog):
    """As two jobs of a sweep do it: in one process, one after the other."""
    run = [*TINY, *SILENT, "logger=wandb", "logger.tensorboard=true", "trainer.log_every_n_steps=1", "resume=auto"]
    run += ["logger.wandb.tags=[first,tiny]", "logger.wandb.notes=a note"]
    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run += [f"logger.mlflow={{experiment: tiny, tracking_uri: '{database}'}}"]
    caplog.set_level(logging.INFO)
    for epochs in (1, 2):
        asked = ("schedule.steps=null", f"schedule.epochs={epochs}", f"logger.wandb.artifact={epochs == 2}")
        best = train(compose_train(*run, *asked, output_dir=tmp_path))["best"]
    assert sum("W&B: offline" in record.message for record in caplog.records) == 2
    assert "WANDB_MODE" not in os.environ
    client = MlflowClient(database)
    (recorded,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert [point.step for point in client.get_metric_history(recorded.info.run_id, "train/loss")] == [*range(10)]
    assert recorded.data.metrics["best/miou"] == pytest.approx(best["val/miou"])
    run_id = (tmp_path / "wandb_id.txt").read_text().strip()
    offline = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert [path.name.rpartition("-")[2] for path in offline] == [run_id] * 2  # `wandb sync` joins them
    for path, steps in zip(offline, (range(6), range(5, 11)), strict=True):  # the test's is last
        end = time.monotonic() + 60
        while set(wandb_steps(path)) != set(steps) and time.monotonic() < end:  # W&B's own process writes the file
            time.sleep(0.5)
        assert sorted(set(wandb_steps(path))) == [*steps]
        content = next(path.glob("*.wandb")).read_bytes()
        for text in (b"train/loss_u_np", b"val/miou", b"first", b"tiny", b"a note"):
            assert text in content
        assert (f"model-{run_id}".encode() in content) == (path == offline[-1])
    records = list(wandb_records(path))
    summary = values_of(item for record in records for item in record.summary.update)
    assert (summary["best/miou"], summary["best/step"]) == (best["val/miou"], best["step"])
    assert best["step"] in (5, 10)
    config = values_of(item for record in records for item in record.config.update)
    assert config["labeled"]["split"] == "4 (seed 0)"
    assert config["trainer"]["accumulate_grad_batches"] == 1
    assert config["method"]["lambda_max"] == 0.25
    assert {"dataset", "loader", "schedule", "evaluation", "objective", "callbacks", "seed", "lr"} <= set(config)
    assert len(list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))) >= 2
    assert [event.step for event in tensorboard_events(tmp_path / "tensorboard", "train/loss")] == list(range(10))
    assert tensorboard_events(tmp_path / "tensorboard", "hp_metric")[-1].value == pytest.approx(best["val/miou"])


def wandb_steps(folder):
    histories = [values_of(record.history.item) for record in wandb_records(folder)]
    return [history["trainer/global_step"] for history in histories if "trainer/global_step" in history]


def values_of(items):
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def wandb_records(folder):
    """Read W&B's own file: protobuf records in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    content, position, data = path.read_bytes(), 7, b""
    while position < len(content):
        if (left := 32768 - position % 32768) < 7:  # a block's rest is padding
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        data += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield wandb_internal_pb2.Record.FromString(data)
            data = b""


def tensorboard_events(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events.Scalars(name)
