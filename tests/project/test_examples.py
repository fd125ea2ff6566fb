"""The programs in examples/, with few steps."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments, as_main="example"):
        monkeypatch.setattr("sys.argv", [str(EXAMPLES / name), *arguments])
        return runpy.run_path(str(EXAMPLES / name), run_name=as_main)["main"]

    return run


def test_lightning_cli_trains_and_uses_its_checkpoint_from_yaml_alone(run, tmp_path):
    config, quick = f"--config={EXAMPLES / 'lightning_cli.yaml'}", ("--trainer.max_epochs=1", "--data.data.train=32")
    small = (*quick, "--trainer.accelerator=cpu", "--data.num_workers=0", "--trainer.enable_progress_bar=false")
    fitted = run("lightning_cli.py", "fit", config, *small)().model
    assert (fitted.method.lambda_max, fitted.hparams["optimizer"]["name"], fitted.global_step) == (0.1, "AdamW", 5)
    checkpoint = f"--ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}"
    for stage, metric in (("validate", "val/miou"), ("test", "test/miou"), ("predict", None)):
        trainer = run("lightning_cli.py", stage, config, checkpoint, *small)().trainer
        assert metric is None or 0 < trainer.callback_metrics[metric] < 1


def test_a_hydra_application_composes_the_groups(run, capsys):
    run("hydra_app.py", "steps=2", "method=unimatch", "decoder.channels=8", as_main="__main__")
    assert "test/miou" in capsys.readouterr().out


def test_a_network_of_smp_is_trained(run, capsys):
    module = run("smp_network.py")(2)
    assert "blocks that may be deactivated: layer1.0, layer1.1, layer2.0" in capsys.readouterr().out
    assert {"u_np", "x_np", "fp", "s1"} <= set(module.last_terms)


def test_a_fabric_loop_lowers_the_loss(run):
    losses = run("fabric_loop.py")(12)
    assert len(losses) == 12
    assert sum(losses[6:]) < sum(losses[:6])


def test_a_model_of_the_hub_is_loaded_and_trained_further(run, tmp_path, capsys):
    module = run("hub_round_trip.py")(2)
    assert (module.method.name, module.global_step, module.hparams["lr"]) == ("mlpmatch", 2, 0.01)
    assert "| val/miou |" in (tmp_path / "shapes_model" / "README.md").read_text()
    assert "validation mIoU" in capsys.readouterr().out
