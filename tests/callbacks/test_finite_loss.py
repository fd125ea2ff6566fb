"""A loss that is not finite: the step is named, kept, and repeated without the data."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import TINY, compose_train, run_command
from lightning.pytorch import Callback, Trainer

from mlpmatch_pl import MLPMatch, SemiSupervisedDataModule
from mlpmatch_pl.callbacks.finite_loss import FiniteLoss
from mlpmatch_pl.callbacks.kept_step import DOUBLE, KeptStep
from mlpmatch_pl.data.datasets.shapes import shapes
from mlpmatch_pl.replay import replay
from mlpmatch_pl.utils.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]
TERMS = ("x", "x_np", "s1", "s2", "fp", "u_np")


class Spoil(Callback):
    """Before a step, puts a value into the network, and remembers the weights at the last step's end."""

    def __init__(self, step, spoil):
        self.step, self.spoil = step, spoil

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.spoil(pl_module)
            self.batch = batch
            self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}


def spoil_strong_views(value):
    """The labeled terms stay finite: the views of the strong pass alone are spoiled."""

    def spoil(module):
        original = module.step.strong_pass

        def strong_pass(*arguments):
            logits, targets = original(*arguments)
            return [logits[0] * value, *logits[1:]], targets

        module.step.strong_pass = strong_pass

    return spoil


def spoil_weight(module):
    module.segmentor.decoder.classifier.weight.data[0] = math.inf


def build(method="mlpmatch", **options):
    torch.manual_seed(0)
    options = {"confidence_threshold": 0.0, **options}
    module = MLPMatch(6, method=method, backbone="test_resnet", decoder_channels=8, lr=0.01, **options)
    data = shapes(labeled=3, train=12, val=2, test=1, size=48)
    datamodule = SemiSupervisedDataModule(data, method=method, crop_size=33, batch_size=2, num_workers=0)
    return module, datamodule


def fit(folder, spoil, method="mlpmatch", step=3, **options):
    module, datamodule = build(method)
    spoiler = Spoil(step, spoil)
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_epochs": 2}
    quiet |= {"enable_model_summary": False, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer = Trainer(**{**quiet, **options}, callbacks=[spoiler, FiniteLoss(str(folder))])
    trainer.fit(module, datamodule=datamodule)
    return module, spoiler


def caught_by(folder, spoil, **options):
    with pytest.raises(UserError) as caught:
        fit(folder, spoil, **options)
    return str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_step_its_terms_and_its_images_are_named(tmp_path, value):
    message = caught_by(tmp_path, spoil_strong_views(value))
    report = json.loads((tmp_path / "step_4" / "report.json").read_text())
    assert report["not_finite"] == ["loss", "s1"]
    assert (report["step"], report["epoch"]) == (4, 1)
    assert report["weights_not_finite"] == []
    assert message.startswith("expected a finite loss, but in step 4 of epoch 1 it is not (s1 ")
    for half, count in (("labeled", 2), ("unlabeled", 2)):
        names = report["images"][half]
        assert len(names) == count
        assert f"{half} {', '.join(names)}" in message
    assert "\n" not in message


def test_the_names_are_those_of_the_batch(tmp_path):
    module, datamodule = build()
    spoiler = Spoil(3, spoil_strong_views(math.nan))
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=1, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[spoiler, FiniteLoss(str(tmp_path))],
    )  # fmt: skip
    with pytest.raises(UserError):
        trainer.fit(module, datamodule=datamodule)
    names = json.loads((tmp_path / "step_4" / "report.json").read_text())["images"]
    train = datamodule.data.train
    for half in ("labeled", "unlabeled"):
        position = [train.name(index) for index in spoiler.batch[half]["index"].tolist()]
        assert names[half] == position
    image = train.image(int(spoiler.batch["labeled"]["index"][0]))
    assert image.shape == (48, 48, 3)


@pytest.mark.parametrize("method", ["mlpmatch", "mlpmatch_official", "unimatch", "fixmatch"])
def test_a_replay_gives_the_same_terms_to_the_last_bit(tmp_path, method):
    # What is computed at the bad step is left as it was: only the callback is told that it is bad.
    def claim(module):
        original = module.training_step

        def training_step(batch, batch_idx):
            loss = original(batch, batch_idx)
            module.last_terms["loss"] = loss.detach() * math.nan
            return loss

        module.training_step = training_step

    caught_by(tmp_path, claim, method=method)
    step, module, _ = KeptStep.load(tmp_path / "step_4")
    repeated, layer = step.repeat(module)
    terms = {name: value for name, value in step.terms.items() if name != "loss"}
    assert {name: repeated[name] for name in terms} == terms
    assert len(terms) > 1
    assert all(value > 0 for value in terms.values())
    assert layer is None


def test_the_replay_says_which_layer_was_first_and_that_the_weights_were_bad(tmp_path, capsys):
    message = caught_by(tmp_path, spoil_weight)
    assert "1 tensors of the network, first segmentor.decoder.classifier.weight, were not finite before it" in message
    replay(tmp_path / "step_4")
    output = capsys.readouterr().out
    assert "weights before the step: not finite in segmentor.decoder.classifier.weight" in output
    assert "first layer whose output is not finite: segmentor.decoder.classifier" in output
    assert output.endswith("all terms are the same, to the last bit\n")


ON_A_MAC = pytest.mark.skipif(torch.backends.mps.is_available(), reason="this device is here")


@pytest.mark.parametrize("device", [pytest.param("mps", marks=ON_A_MAC), "xpu"])  # the latter Lightning does not know
def test_a_step_of_a_device_that_is_not_here_is_repeated_on_the_cpu_in_float32(tmp_path, capsys, recwarn, device):
    caught_by(tmp_path, spoil_strong_views(math.nan))
    folder = tmp_path / "step_4"
    kept = torch.load(folder / "batch.pt", weights_only=True)
    torch.save({**kept, "device": device, "precision": "16-mixed"}, folder / "batch.pt")
    recwarn.clear()
    repeated = replay(folder)
    output = capsys.readouterr().out
    place = f"on {device} in 16-mixed; repeated on cpu in 32-true: there is no {device} here"
    assert output.startswith(f"step 4 of epoch 1, {place}\n")
    assert output.endswith(f"not compared to the last bit: 16-mixed on {device} rounds, and overflows, elsewhere\n")
    assert "are the same" not in output
    assert [warning for warning in recwarn if "precision" in str(warning.message)] == []
    assert repeated["x"] == kept["terms"]["x"]  # which was computed here, in float32


def test_a_step_in_bfloat16_is_repeated_in_bfloat16(tmp_path, capsys):
    caught_by(tmp_path, spoil_weight, precision="bf16-mixed")
    replay(tmp_path / "step_4")
    output = capsys.readouterr().out
    assert output.startswith("step 4 of epoch 1, on cpu in bf16-mixed; repeated on cpu in bf16-mixed\n")
    assert output.endswith("all terms are the same, to the last bit\n")


def test_a_step_in_float64_is_repeated_in_float64(tmp_path, capsys):
    caught_by(tmp_path, spoil_strong_views(math.nan), precision=DOUBLE)
    step, module, _ = KeptStep.load(tmp_path / "step_4")
    repeated, _ = step.repeat(module)
    assert {name: repeated[name] for name in ("x", "x_np", "fp")} == {
        name: step.terms[name] for name in ("x", "x_np", "fp")
    }
    assert repeated["x"] != float(torch.tensor(repeated["x"]).float())  # no number of float32
    replay(tmp_path / "step_4")
    assert capsys.readouterr().out.startswith(f"step 4 of epoch 1, on cpu in {DOUBLE}; repeated on cpu in {DOUBLE}\n")


def test_the_weights_that_are_kept_are_those_before_the_step(tmp_path):
    module, datamodule = build("mlpmatch_official")
    spoiler = Spoil(3, spoil_strong_views(math.nan))
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=1, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[spoiler, FiniteLoss(str(tmp_path))],
    )  # fmt: skip
    with pytest.raises(UserError):
        trainer.fit(module, datamodule=datamodule)
    kept = torch.load(tmp_path / "step_4" / "module.ckpt", weights_only=True)["state_dict"]
    counters = {name for name in kept if name.endswith("num_batches_tracked")}  # which no step reads
    assert [n for n in kept if n not in counters and not torch.equal(kept[n], spoiler.before[n])] == []
    assert any(name.endswith("running_mean") for name in kept)


def test_accumulated_batches_are_looked_at_one_by_one(tmp_path):
    message = caught_by(tmp_path, spoil_strong_views(math.nan), step=1, accumulate_grad_batches=2)
    assert "in step 2 of epoch 1" in message
    step, module, _ = KeptStep.load(tmp_path / "step_2")
    assert step.draw_step == 2
    assert math.isnan(step.terms["s1"])
    assert step.repeat(module)[0]["x"] == step.terms["x"]


def test_a_finite_training_leaves_nothing_and_computes_the_same(tmp_path):
    guarded, _ = fit(tmp_path / "nonfinite", lambda module: None)
    module, datamodule = build()
    Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=2, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, datamodule=datamodule)  # fmt: skip
    assert not (tmp_path / "nonfinite").exists()
    other = module.state_dict()
    assert [name for name, value in guarded.state_dict().items() if not torch.equal(value, other[name])] == []


def test_a_step_is_never_written_over(tmp_path):
    for _ in range(2):
        caught_by(tmp_path, spoil_strong_views(math.nan))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_4", "step_4-2"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    message = caught_by(tmp_path / "file" / "nonfinite", spoil_strong_views(math.nan))
    assert "the step could not be kept for a replay (" in message


@pytest.mark.parametrize("name", ["module.ckpt", "batch.pt", "report.json"])
def test_a_full_disk_leaves_no_part_of_a_step(tmp_path, monkeypatch, name):
    original, full = os.fsync, OSError(errno.ENOSPC, "No space left on device")

    def fsync(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"{name}.unfinished"):
            raise full
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    message = caught_by(tmp_path, spoil_strong_views(math.nan))
    assert "the step could not be kept for a replay (expected " in message
    assert f"{name}, but the disk is full" in message
    assert [*tmp_path.rglob("*")] == []


@pytest.mark.parametrize("name", ["batch.pt", "module.ckpt", "report.json"])
def test_a_folder_without_a_step_is_refused(tmp_path, name):
    caught_by(tmp_path, spoil_strong_views(math.nan))
    (tmp_path / "step_4" / name).write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"expected the folder of a step, .* cannot be read as one"):
        replay(tmp_path / "step_4")


def test_the_configuration_of_every_run_has_the_guard(tmp_path):
    node = compose_train(output_dir=tmp_path).callbacks.finite
    assert node._target_ == "mlpmatch_pl.callbacks.finite_loss.FiniteLoss"
    assert node.dirpath == f"{tmp_path}/nonfinite"


@pytest.mark.slow
def test_the_command_stops_and_the_step_is_repeated_elsewhere(tmp_path):
    result = run_command(*TINY, "hydra.run.dir=run", "schedule.lr=1e30", cwd=tmp_path)
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: expected a finite loss, but in step 2 of epoch 1 it is not (x nan, ")
    shutil.move(tmp_path / "run" / "nonfinite" / "step_2", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "run")
    again = run_command("elsewhere", cwd=tmp_path, module="mlpmatch_pl.replay")
    assert again.returncode == 0, again.stderr
    assert "all terms are the same, to the last bit" in again.stdout


SCRIPT = """
import sys

import torch
from lightning.pytorch import Trainer
from test_nonfinite import Spoil, build, spoil_strong_views

from mlpmatch_pl.callbacks.finite_loss import FiniteLoss


class SpoilOneProcess(Spoil):
    def on_train_batch_start(self, trainer, *rest):
        if trainer.global_rank == 1:
            super().on_train_batch_start(trainer, *rest)


if __name__ == "__main__":
    torch.set_num_threads(1)
    module, datamodule = build()
    callbacks = [SpoilOneProcess(1, spoil_strong_views(float("nan"))), FiniteLoss(sys.argv[1])]
    Trainer(
        accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False, max_epochs=9, logger=False,
        callbacks=callbacks, limit_val_batches=0, enable_checkpointing=False, enable_progress_bar=False,
    ).fit(module, datamodule=datamodule)
"""


@pytest.mark.slow
def test_no_process_waits_for_one_whose_loss_is_not_finite(tmp_path, request):
    (tmp_path / "script.py").write_text(SCRIPT)
    path = f"{request.path.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    result = subprocess.run(
        [sys.executable, "script.py", "kept"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode != 0
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["step_2_process1"]
    assert "in step 2 of epoch 1 that of another process is not" in result.stderr
    step, module, _ = KeptStep.load(tmp_path / "kept" / "step_2_process1")
    assert math.isnan(step.terms["s1"])
    assert math.isfinite(step.repeat(module)[0]["x"])


@pytest.mark.gpu
def test_looking_at_the_loss_does_not_make_the_gpu_wait(tmp_path):
    module, _ = build()
    module.cuda()
    guard, trainer = FiniteLoss(str(tmp_path)), Trainer(accelerator="gpu", devices=1, logger=False)
    guard.on_train_start(trainer, module)
    torch.cuda.set_sync_debug_mode("error")
    try:
        guard.on_train_batch_start(trainer, module, {}, 0)
        module.last_terms = {"loss": torch.ones((), device="cuda")}
        guard.on_before_backward(trainer, module, module.last_terms["loss"])
        guard.on_after_backward(trainer, module)
    finally:
        torch.cuda.set_sync_debug_mode("default")
