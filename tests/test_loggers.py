import logging
import os

import pytest
from helpers import TINY, compose_train, run_command

from mlpmatch_pl.data.splits import Split
from mlpmatch_pl.errors import UserError
from mlpmatch_pl.loggers import MetricsCSV, build_loggers, wandb_mode
from mlpmatch_pl.train import train


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
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


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

    monkeypatch.setattr("mlpmatch_pl.loggers.TensorBoardLogger", missing)
    with pytest.raises(UserError, match=r"pip install 'mlpmatch_pl\[tensorboard\]'"):
        build_loggers({"logger": {"wandb": None, "tensorboard": True}}, tmp_path, Split("list", ("a",)))
